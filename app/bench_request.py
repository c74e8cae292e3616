"""What the bench commands are asked for, from words to values."""

import importlib.util
import math

import torch

from vdit_sparse.app.bench_kernels import KernelBench
from vdit_sparse.app.bench_model import ModelBench
from vdit_sparse.app.options import DTYPES, InputError, hint, parse_size
from vdit_sparse.kernels.bench.kernels import CPU_KERNELS, GPU_KERNELS, KERNELS
from vdit_sparse.kernels.bench.problem import PATTERNS, SHAPES
from vdit_sparse.kernels.block_mask import BLOCK_SIZES
from vdit_sparse.kernels.block_sparse import PRECISIONS
from vdit_sparse.methods import METHODS
from vdit_sparse.pipelines.checkpoints import Checkpoint
from vdit_sparse.pipelines.random_model import SIZES

# PFLOP of a forward's attention, a few minutes of two cores.
LARGEST_UNASKED = 0.02


def parse_model(words: dict) -> ModelBench:
    """The request of `bench model`. Raises InputError for anything that cannot be measured."""
    size = SIZES[choice("--model", words["model"], SIZES)]
    height, width = parse_size(words["size"])
    video = (height, width, words["frames"])
    try:
        size.latent(*video)
    except ValueError as error:
        raise InputError(f"--size {words['size']} --frames {words['frames']}: {error}") from error
    device = parse_device(words["device"])
    on_gpu = device.type == "cuda"
    layers = size.layers if words["layers"] is None else words["layers"]
    at_least_one(layers=layers, rounds=words["rounds"])
    if not on_gpu and words["device"] is None:
        _check_patience(size, video, layers)
    return ModelBench(
        size=size,
        video=video,
        layers=layers,
        device=device,
        dtype=parse_dtype(words["dtype"], device),
        methods=parse_methods(words["method"]),
        precisions=choices("--precision", words["precision"] or ["bf16"], PRECISIONS),
        density=parse_density(words["density"]),
        block=parse_block(words["block"]),
        dense=tuple(words["dense"] or _dense_backends(on_gpu, size.joint)),
        compiled=words["compile"],
        rounds=words["rounds"],
        kernels=words["kernels"],
    )


def _check_patience(size: Checkpoint, video: tuple[int, int, int], layers: int) -> None:
    """Raises InputError for forwards that take a CPU longer than anyone waits unasked."""
    tokens = size.grid(*video).tokens
    pflop = 4 * tokens**2 * size.heads * size.head_dim * layers / 1e15
    if pflop > LARGEST_UNASKED:
        raise InputError(
            f"There is no GPU here, and the attention of one dense forward of {layers} layers at "
            f"{tokens:,} tokens is {pflop:,.2f} PFLOP, too much to begin on a CPU unasked. Give a "
            "smaller --size, --frames or --layers, or --device cpu to run it all the same."
        )


def _dense_backends(on_gpu: bool, masked: bool) -> list[str]:
    """The best that can be asked for: cuDNN's, and FlashAttention-3 where it is installed. A model
    that gives attention a mask may have it faster from torch's own choice."""
    if not on_gpu:
        return ["native"]
    flash = ["_flash_3"] if importlib.util.find_spec("flash_attn_interface") else []
    return ["_native_cudnn", *(["native"] if masked else flash)]


def parse_kernels(words: dict) -> KernelBench:
    """The request of `bench kernels`. Raises InputError for anything that cannot be measured."""
    device = parse_device(words["device"])
    default = CPU_KERNELS if device.type == "cpu" else GPU_KERNELS
    shapes = choices("--shape", words["shape"] or list(SHAPES), SHAPES)
    methods = words["method"]
    return KernelBench(
        shapes={name: SHAPES[name] for name in shapes},
        kernels=choices("--kernel", words["kernel"] or list(default), KERNELS),
        patterns=choices("--pattern", words["pattern"] or list(PATTERNS), PATTERNS),
        methods=() if methods == ["none"] else parse_methods(methods),
        densities=tuple(parse_density(each) for each in words["density"] or [0.25, 0.1]),
        block=parse_block(words["block"]),
        device=device,
        dtype=parse_dtype(words["dtype"], device),
        seconds=parse_seconds(words.get("seconds")),
    )


def parse_methods(names: list[str] | None) -> tuple[str, ...]:
    return choices("--method", names or list(METHODS), METHODS)


def parse_device(name: str | None) -> torch.device:
    """A CPU or CUDA device that is there; default the GPU if there is one."""
    there = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if there else "cpu"))
    except RuntimeError:
        raise InputError(f"--device must be cpu, cuda or cuda:1, got {name!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= there:
        raise InputError(f"--device {name}: torch finds {there or 'no'} cuda devices.")
    return device


def parse_dtype(name: str | None, device: torch.device) -> torch.dtype:
    name = name or ("bf16" if device.type == "cuda" else "fp32")
    return DTYPES[choice("--dtype", name, DTYPES)]


def parse_density(density: float) -> float:
    if not 0 < density <= 1:
        raise InputError(f"--density must be above 0 and at most 1, got {density}.")
    return density


def parse_seconds(seconds: float | None) -> float:
    if seconds is not None and not seconds > 0:
        raise InputError(f"--seconds must be above 0, got {seconds}.")
    return math.inf if seconds is None else seconds


def parse_block(block: int) -> int:
    if block not in BLOCK_SIZES:
        raise InputError(f"--block must be one of {BLOCK_SIZES} tokens, got {block}.")
    return block


def at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"--{name} must be at least 1, got {number}.")


def choice(option: str, name: str, names) -> str:
    """`name`, if it is one of `names`."""
    if name not in names:
        raise InputError(
            f"{option} must be one of {', '.join(names)}, got {name!r}{hint(name, list(names))}."
        )
    return name


def choices(option: str, given: list[str], names) -> tuple[str, ...]:
    return tuple(choice(option, name, names) for name in given)
