"""What a figure was measured on: versions, machine and commit. Every look is guarded."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import vdit_sparse

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate")


def versions() -> dict[str, str | None]:
    """Version of this package, of Python, and of each package that matters; None if not there."""
    return {
        "vdit_sparse": vdit_sparse.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
    }


def machine(device: torch.device) -> dict[str, object]:
    """The machine that a run on `device` uses."""
    described = {
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def commit() -> str | None:
    """The commit of the checkout this runs from, with "+changes" if files differ; None without."""
    root = Path(vdit_sparse.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if _git(root, "status", "--porcelain", "-uno") else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
