"""Reports of stages: JSON files whose Markdown goes into the model card, with what a number needs
beside it."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from vdit_sparse.kernels.bench import machine


def write_report(
    path: Path, markdown: str, content: Mapping, device: str | torch.device, command: str
) -> None:
    """Writes `{"markdown", "command", machine, versions, commit, **content}`, at once.

    markdown: what the card shows; command: the command line that found it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"command": command, **machine(torch.device(device))}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"markdown": markdown, **content, **facts}, indent=1) + "\n")
    partial.replace(path)
