"""What tiny pipelines are made of: tokenizers from a vocabulary in memory, encoders, a VAE."""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

CHARACTERS = string.ascii_lowercase + string.digits + ".,!?'-:"
# Arguments that every family's call has.
CALL = {
    "prompt": "a cat runs",
    "num_inference_steps": 2,
    "output_type": "latent",
    "return_dict": False,
}
BATCH = {"prompt": ["a cat", "a white dog runs away"]}


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline for the contract of all families.

    call: arguments for a sequence of some blocks of 64 tokens and 2 steps; its prompt is one.
    odd: changed arguments for another size, one that no block divides.
    tolerance: largest difference in latents between stock attention and all blocks kept.
    batch: changed arguments for two prompts of unequal length in one batch.
    refused: which of METHODS cannot run -> words of the reason.
    """

    pipe: DiffusionPipeline
    call: Mapping[str, object]
    odd: Mapping[str, object]
    tolerance: float = 2e-5
    batch: Mapping[str, object] = field(default_factory=lambda: BATCH)
    refused: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.pipe.set_progress_bar_config(disable=True)


def t5_tokenizer() -> T5Tokenizer:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(character, -3.0) for character in CHARACTERS]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def clip_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS]
    tokens += [f"{character}</w>" for character in CHARACTERS]
    ids = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=[], model_max_length=77)


def llama_tokenizer() -> LlamaTokenizer:
    tokens = ["<unk>", "<s>", "</s>", "\u2581", *CHARACTERS, *string.ascii_uppercase, *"{}<|>_\n"]
    ids = {token: number for number, token in enumerate(tokens)}
    # It has no pad token of its own, and pads on the left.
    made = LlamaTokenizer(vocab=ids, merges=[], pad_token="</s>", model_max_length=512)
    made.padding_side = "right"
    return made


def qwen_tokenizer(*more: str) -> Qwen2Tokenizer:
    """Byte-level: all bytes, and the special tokens of a chat; more: further tokens."""
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>", *more]
    ids = {token: number for number, token in enumerate(tokens)}
    made = Qwen2Tokenizer(vocab=ids, merges=[], model_max_length=4096)
    if more:
        made.add_special_tokens({"additional_special_tokens": [*tokens[-2 - len(more) :]]})
    return made


def qwen_vl_encoder(width: int = 16) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "vocab_size": 300,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3_encoder(width: int = 16) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config).eval()


def umt5_encoder() -> UMT5EncoderModel:
    torch.manual_seed(0)
    return UMT5EncoderModel(UMT5Config(**_T5)).eval()


def t5_encoder(width: int = 32) -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(**{**_T5, "d_model": width})).eval()


_T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}


def clip_encoder(width: int = 32, *, projection: bool = False):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def llama_encoder(width: int = 16) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaModel(config).eval()


def gemma_tokenizer() -> GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *CHARACTERS]
    ids = {token: number for number, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=ids, merges=[], model_max_length=512)


def gemma3_encoder(width: int = 16) -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "vocab_size": 128,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    images = {"mm_tokens_per_image": 4, "image_token_index": 122}
    images |= {"boi_token_index": 120, "eoi_token_index": 121}
    config = Gemma3Config(text_config=text, vision_config=vision, **images)
    return Gemma3ForConditionalGeneration(config).eval()


def encoding_once(vae: torch.nn.Module) -> torch.nn.Module:
    """The VAE with `encode` done once for each shape, for tests that always give one image."""
    encode, done = vae.encode, {}

    def once(x, **options):
        if x.shape not in done:
            done[x.shape] = encode(x, **options)
        return done[x.shape]

    vae.encode = once
    return vae


def image_vae(channels: int = 4, **config) -> AutoencoderKL:
    """An image VAE of one level: latents have the image's height and width."""
    torch.manual_seed(0)
    config = {
        "block_out_channels": (8,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "norm_num_groups": 4,
        **config,
    }
    return AutoencoderKL(latent_channels=channels, **config).eval()


def wan_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return vae.eval()


def flow(**config) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)
