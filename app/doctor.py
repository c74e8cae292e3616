"""What this machine has and what of it works, for `vdit-sparse doctor`."""

import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module

import torch
from rich.console import Console
from rich.table import Table

from vdit_sparse.app.checks import bundled_model
from vdit_sparse.app.environment import commit, machine, versions

# Dense backend of diffusers -> the module it needs, which is no dependency of ours.
DENSE_MODULES = {
    "flash": "flash_attn",
    "_flash_3": "flash_attn_interface",
    "sage": "sageattention",
    "xformers": "xformers.ops",
}


@dataclass(frozen=True)
class Check:
    """One line of the doctor. ok: None where there is nothing to be right or wrong."""

    section: str
    name: str
    detail: str
    ok: bool | None = None


def examine() -> list[Check]:
    """All checks. None raises: one that fails says why."""
    return [check for probe in _PROBES for check in _guarded(probe)]


def as_data(checks: list[Check]) -> dict:
    """The checks as plain data."""
    return {"checks": [asdict(check) for check in checks]}


def show(checks: list[Check], console: Console) -> None:
    """Prints the checks as a table."""
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    marks = {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}
    section = None
    for check in checks:
        if section not in (None, check.section):
            table.add_row("", "", "", "")
        shown = "" if check.section == section else check.section
        table.add_row(shown, check.name, marks[check.ok], check.detail)
        section = check.section
    console.print(table, highlight=False)


def _guarded(probe: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from probe()
    except Exception as error:
        name = probe.__name__.strip("_").replace("_", " ")
        yield Check(name, "failed", _said(error), ok=False)


def _versions() -> Iterator[Check]:
    for name, version in versions().items():
        missing = version is None and name not in ("triton", "cuda")
        yield Check("versions", name, version or "none", ok=False if missing else None)
    yield Check("versions", "commit", commit() or "not a checkout")


def _machine() -> Iterator[Check]:
    said = machine(torch.device("cpu"))
    yield Check("machine", "system", platform.platform())
    yield Check("machine", "processor", f"{said['processor']}, {said['threads']} threads")
    if not torch.cuda.is_available():
        yield Check("machine", "GPU", "torch finds none")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        yield Check("machine", f"cuda:{index}", f"{gpu.name}, {capability}, {memory}")


def _sparse_kernels() -> Iterator[Check]:
    from vdit_sparse.kernels.block_sparse import BACKENDS, choose_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in BACKENDS:
        problem = _kernel_problem(name, device)
        yield Check("sparse kernels", name, problem or f"right on {device}", ok=problem is None)
    chosen = choose_backend(*_attention_inputs(device)[:4])
    yield Check("sparse kernels", "default", chosen)


def _kernel_problem(name: str, device: torch.device) -> str | None:
    """Runs the backend on a small input and compares it with dense attention."""
    from vdit_sparse.kernels.block_sparse import block_sparse_attention, explain

    q, k, v, mask = _attention_inputs(device)
    reason = explain(q, k, v, mask)[name]
    if reason is not None:
        return reason
    try:
        with torch.no_grad():
            out = block_sparse_attention(q, k, v, mask, backend=name)[0]
    except Exception as error:
        return _said(error)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    error = (out.float() - expected.float()).abs().max().item()
    return None if error < 0.02 else f"wrong by {error:.3g} on {device}"


def _attention_inputs(device: torch.device):
    from vdit_sparse.kernels.block_mask import BlockMask

    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, 2, 256, 64)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    everything = torch.ones(2, 2, dtype=torch.bool, device=device)
    return q, k, v, BlockMask.from_keep(everything, 128)


def _dense_backends() -> Iterator[Check]:
    yield Check("dense backends", "native", "torch's scaled_dot_product_attention", ok=True)
    cudnn = torch.cuda.is_available() and torch.backends.cudnn.is_available()
    said = f"cuDNN {torch.backends.cudnn.version()}" if cudnn else "needs CUDA and cuDNN"
    yield Check("dense backends", "_native_cudnn", said, ok=cudnn)
    for name, module in DENSE_MODULES.items():
        try:
            version = getattr(import_module(module.split(".")[0]), "__version__", "")
            import_module(module)
            yield Check("dense backends", name, f"{module} {version}".strip(), ok=True)
        except Exception as error:
            yield Check("dense backends", name, _said(error), ok=False)


def _video() -> Iterator[Check]:
    import imageio_ffmpeg

    said = f"{imageio_ffmpeg.get_ffmpeg_version()}, {imageio_ffmpeg.get_ffmpeg_exe()}"
    yield Check("files", "ffmpeg", said, ok=True)


def _bundled_model() -> Iterator[Check]:
    folder = bundled_model()
    if not (folder / "model_index.json").is_file():
        said = f"there is no model in {folder}; give one with --model"
        yield Check("files", "bundled model", said, ok=False)
        return
    # The training code beside the model is no part of it.
    parts = [file for file in folder.glob("*/*") if file.parent.name != "training"]
    size = sum(file.stat().st_size for file in parts if file.is_file()) / 2**20
    yield Check("files", "bundled model", f"{folder}, {size:.1f} MiB", ok=True)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


_PROBES = (_versions, _machine, _sparse_kernels, _dense_backends, _video, _bundled_model)
