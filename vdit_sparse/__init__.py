"""Sparse attention for diffusers' video and image diffusion transformers.

    import vdit_sparse
    pipe = vdit_sparse.load_pipeline()  # the bundled model; or a hub id, or a folder
    pipe.set_attn_processor(vdit_sparse.RadialAttention())  # or a preset's name
    frames = pipe("a fox walks to the right in the forest").frames[0]

Importing this package imports neither diffusers nor triton and touches no GPU: the names below are
loaded when they are first used.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# In a checkout the rooms (kernels/, pipelines/, eval/, app/) are siblings of this folder; in a
# wheel they lie inside it.
_root = Path(__file__).parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

_HOMES = {
    "AdaSpaAttention": "vdit_sparse.methods",
    "BlockMask": "vdit_sparse.kernels.block_mask",
    "Call": "vdit_sparse.method",
    "DraftAttention": "vdit_sparse.methods",
    "Grid": "vdit_sparse.grid",
    "METHODS": "vdit_sparse.methods",
    "PAROAttention": "vdit_sparse.methods",
    "Plan": "vdit_sparse.method",
    "RadialAttention": "vdit_sparse.methods",
    "RettentionAttention": "vdit_sparse.methods",
    "SparseAttention": "vdit_sparse.method",
    "SparseVDiTAttention": "vdit_sparse.methods",
    "WanImageToVideoPipeline": "vdit_sparse.pipelines.wan",
    "WanPipeline": "vdit_sparse.pipelines.wan",
    "apply": "vdit_sparse.pipelines.attach",
    "block_sparse_attention": "vdit_sparse.kernels.block_sparse",
    "cfg_parallel": "vdit_sparse.pipelines.parallel",
    "context_parallel": "vdit_sparse.pipelines.parallel",
    "context_parallel_plan": "vdit_sparse.pipelines.parallel",
    "load_pipeline": "vdit_sparse.pipelines.load",
    "parallel_mesh": "vdit_sparse.pipelines.parallel",
    "remove": "vdit_sparse.pipelines.attach",
    "summary": "vdit_sparse.pipelines.attach",
}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'vdit_sparse' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
