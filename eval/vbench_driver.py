"""Runs in VBench's environment, which has nothing of ours: one dimension by its Python API.

    PYTHON -c "..." '{"videos": DIR, "info": FILE, "out": DIR, "dimension": NAME, ...}'

Its command line would need CUDA and NCCL, and breaks on prompts with quotes (VBench issue 79).
"""

import json
import sys

import torch
from vbench import VBench


def main() -> None:
    asked = json.loads(sys.argv[1])
    device = asked["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    VBench(torch.device(device), asked["info"], asked["out"]).evaluate(
        videos_path=asked["videos"],
        name=asked["dimension"],
        dimension_list=[asked["dimension"]],
        mode=asked["mode"],
    )


if __name__ == "__main__":
    main()
