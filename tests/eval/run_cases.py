"""An evaluation with a fake pipeline that takes no time, and a process that kills itself in it.

    python -m tests.eval.run_cases DIR

reads a number a line, forks, and runs the evaluation in the child, which sends itself SIGKILL at
the so-manyth change of a file, in the middle of it where it is a write of a row (0: never). It
answers with the child's exit status. Forking saves importing torch each time.
"""

import os
import signal
import sys
import zlib
from pathlib import Path

import torch

from vdit_sparse.eval.files import new_file
from vdit_sparse.eval.metrics import METRICS
from vdit_sparse.eval.run import Evaluation, Trial, samples_of
from vdit_sparse.eval.store import Made, Store
from vdit_sparse.eval.suite import Prompt, Suite

SUITE = Suite("toy", tuple(Prompt(text) for text in ("a cat", "A cat", "a dog, 'running'", "x/y")))
TRIALS = (
    Trial("dense", "dense"),
    Trial("radial", "radial decay=0.5", method=object(), settings={"decay": 0.5}),
    Trial("draft", "draft", method=object(), settings={"density": 0.25}),
)
SEEDS = (0, 1)
PROTOCOL = {"version": 1, "settings": {"steps": 3}, "metrics": ["psnr"]}
SHAPE = (2, 3, 8, 8)


def make(prompt, seed, trial):
    """The same frames for the same arguments."""
    number = zlib.crc32(f"{prompt.text} {seed} {trial.name}".encode())
    frames = torch.randint(0, 255, SHAPE, generator=torch.Generator().manual_seed(number))
    seconds = 2.0 if trial.name == "dense" else 1.0
    facts = {"density": 0.5, "denoise_seconds": seconds}
    return Made(frames.to(torch.uint8), facts, frames[:, :, :4, :4].float())


def measure(made, reference, prompt):
    if reference is None:
        return {"metrics": {}}
    pairs = {
        "psnr": (made.frames, reference.frames),
        "latent_error": (made.latents, reference.latents),
    }
    return {"metrics": {name: METRICS[name](*pair) for name, pair in pairs.items()}}


def write(path, frames):
    with new_file(path) as temporary:
        temporary.write_bytes(frames.numpy().tobytes())


def evaluation(folder, worker="main", **changes):
    fields = {"make": make, "measure": measure, "write": write, "trials": TRIALS, **changes}
    store = Store(Path(folder), worker)
    return Evaluation(store, store.agree(PROTOCOL), SUITE, **fields)


def all_samples():
    return samples_of(SUITE, SEEDS)


def _logged(folder):
    def logged(prompt, seed, trial):
        with (folder / "made.log").open("a") as log:
            log.write(f"{trial.name} {seed} {prompt.text}\n")
        return make(prompt, seed, trial)

    return logged


def _arm(limit):
    """From now on the so-manyth change of a file kills this process."""
    left = [limit]
    stock_write = os.write

    def passes():
        left[0] -= 1
        return left[0] != 0

    def audit(event, arguments):
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.truncate", "os.link")
        opens = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (changes or opens) and not passes():
            os.kill(os.getpid(), signal.SIGKILL)

    def half(descriptor, data):
        if not passes():
            stock_write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return stock_write(descriptor, data)

    os.write = half
    sys.addaudithook(audit)


def main(folder):
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _arm(int(line))
            running = evaluation(folder, make=_logged(folder))
            for sample in all_samples():
                running.do(sample)
            os._exit(0)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
