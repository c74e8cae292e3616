"""What every cell of docs/compatibility.md says; test_stack.py holds each of them to it."""

from typing import NamedTuple

# Entry of the tiny models -> the family's name in the table.
ROWS = {
    "allegro": "Allegro",
    "chroma": "Chroma",
    "cogvideox": "CogVideoX",
    "cosmos": "Cosmos",
    "flux": "FLUX.1",
    "flux2-dev": "FLUX.2 dev",
    "flux2-klein": "FLUX.2 klein",
    "hidream": "HiDream",
    "hunyuan-dit": "HunyuanDiT",
    "hunyuan-video": "HunyuanVideo",
    "hunyuan-video-1.5": "HunyuanVideo 1.5",
    "kandinsky5": "Kandinsky 5",
    "ltx-video": "LTX-Video",
    "ltx2": "LTX-2",
    "mochi": "Mochi",
    "pixart-sigma": "PixArt",
    "qwen-image": "Qwen-Image",
    "skyreels-v2": "SkyReels-V2",
    "stable-diffusion-3.5": "Stable Diffusion 3.5",
    "wan": "Wan 2.1",
    "wan-two-experts": "Wan 2.2 (two experts)",
    "wan-vace": "Wan VACE",
    "z-image": "Z-Image",
}


class Outcome(NamedTuple):
    """kind: what becomes of the feature.

    works: in both orders; words unused.
    no effect: it changes nothing in stock diffusers either.
    apply again: a method before it raises the words at the next run, until it is applied again.
    first: it has to come before the method, which raises the words otherwise.
    absent: diffusers does not have it for the family, and stock raises the words.
    stock fails: it has, and stock raises the words.
    """

    kind: str
    reason: str = ""
    words: str = ""


WORKS = Outcome("works")
NO_LORA = Outcome("absent", "its transformer loads no adapters", "add_adapter")
NO_CACHE = Outcome("absent", "its transformer has no `enable_cache`", "enable_cache")
NO_BLOCK = Outcome(
    "absent", "its blocks are not registered with diffusers' hooks", "class .* not registered"
)
NO_CONTEXT = Outcome("stock fails", "its pipeline sets no cache context", "No cache context is set")
OTHER_NAMES = Outcome(
    "stock fails",
    "diffusers' hook asks its blocks for arguments of other names",
    "hidden_states",
)
NO_GROUPS = Outcome(
    "absent", "its transformer says that it cannot", "does not support group offloading"
)
UNTOLD = Outcome(
    "absent",
    "its attention does not say whether it is cross-attention, which the hook asks",
    "is_cross_attention",
)
UNREACHED = Outcome("no effect", "stock calls SDPA itself, which no backend reaches")
POOLED = Outcome(
    "stock fails",
    "its text pooling hands its weights to a function of torch, past hooks and quantised tensors",
    "meta tensor|unimplemented operator",
)
NO_FUSION = Outcome(
    "absent", "its transformer has no `fuse_qkv_projections`", "no attribute 'fuse_qkv_projections'"
)
SWAPPED = Outcome(
    "apply again", "diffusers puts other processors in", "have lost their sparse processor"
)
BEFORE = Outcome(
    "first",
    "cache-dit replaces the transformer's forward, and our hook with it",
    "has to come before the method",
)


def _of(outcome: Outcome, *entries: str) -> dict[str, Outcome]:
    return dict.fromkeys(entries, outcome)


_UNCACHED = _of(
    NO_CACHE,
    "cosmos",
    "hidream",
    "hunyuan-dit",
    "pixart-sigma",
    "stable-diffusion-3.5",
    "z-image",
)
_UNREGISTERED = _of(NO_BLOCK, "allegro", "chroma", "hunyuan-video-1.5", "ltx2", "skyreels-v2")

# Feature -> entry -> outcome, where it does not simply work.
OUTCOMES: dict[str, dict[str, Outcome]] = {
    "group-leaf": _of(NO_GROUPS, "hunyuan-dit"),
    "group-block": _of(NO_GROUPS, "hunyuan-dit"),
    "sequential": {
        "hunyuan-dit": POOLED,
    },
    "int8": _of(POOLED, "hunyuan-dit"),
    "fp8": _of(POOLED, "hunyuan-dit"),
    "lora": _of(NO_LORA, "allegro", "hunyuan-dit", "pixart-sigma"),
    "fuse": {
        **_of(NO_FUSION, "allegro", "cosmos", "hidream", "mochi", "z-image"),
        **_of(SWAPPED, "cogvideox", "hunyuan-dit", "pixart-sigma"),
        "kandinsky5": Outcome("stock fails", "its projections have other names", "to_q"),
        "ltx2": Outcome(
            "stock fails",
            "it fuses keys and values of sound, which are of another size",
            "Sizes of",
        ),
        "stable-diffusion-3.5": Outcome(
            "stock fails", "diffusers' fused processor expects text in its second attention", "ndim"
        ),
    },
    "backend": _of(
        UNREACHED,
        "allegro",
        "cogvideox",
        "hidream",
        "hunyuan-dit",
        "mochi",
        "pixart-sigma",
        "stable-diffusion-3.5",
    ),
    "first-block": {
        **_UNCACHED,
        **_UNREGISTERED,
        "flux2-dev": NO_CONTEXT,
        "flux2-klein": Outcome(
            "stock fails", "the hook takes its two streams for one", "operand type"
        ),
        "kandinsky5": OTHER_NAMES,
    },
    "pyramid": {
        **_UNCACHED,
        "kandinsky5": Outcome(
            "stock fails", "its pipeline tells no `current_timestep`", "current_timestep"
        ),
        "qwen-image": Outcome(
            "stock fails", "text of both guidance branches shares a cache", "must match the size"
        ),
    },
    "magnitude": {**_UNCACHED, **_UNREGISTERED},
    "taylor": {**_UNCACHED, **_of(NO_CONTEXT, "allegro", "chroma", "flux2-dev", "kandinsky5")},
    "cache-dit": {
        **_of(BEFORE, "chroma", "flux", "hidream", "hunyuan-dit", "wan-vace"),
        "ltx2": Outcome("stock fails", "cache-dit 1.5.3 does not know its argument", "sigma"),
    },
    "layer-skip": {
        **_UNREGISTERED,
        **_of(NO_BLOCK, "cosmos", "hidream", "hunyuan-dit", "wan-vace"),
        **_of(OTHER_NAMES, "kandinsky5", "z-image"),
        "qwen-image": Outcome(
            "stock fails", "the hook returns text and image the wrong way round", "must match"
        ),
        "stable-diffusion-3.5": Outcome(
            "stock fails", "the hook returns text and image the wrong way round", "invalid for"
        ),
    },
    "score-skip": _of(
        UNTOLD,
        "chroma",
        "flux",
        "flux2-dev",
        "flux2-klein",
        "hidream",
        "kandinsky5",
        "ltx-video",
        "ltx2",
        "mochi",
    ),
}


def outcome_of(feature: str, entry: str) -> Outcome:
    return OUTCOMES.get(feature, {}).get(entry, WORKS)
