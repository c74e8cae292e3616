"""Random diffusers pipelines of a few thousand parameters, built offline in milliseconds."""

from tests.tiny_models.wan import WAN_CALL, tiny_wan, tiny_wan_i2v, wan_i2v_call, wan_transformer

__all__ = ["WAN_CALL", "tiny_wan", "tiny_wan_i2v", "wan_i2v_call", "wan_transformer"]
