"""What all samples of an evaluation have in common, written down: its protocol."""

from dataclasses import asdict

from vdit_sparse.app.environment import machine, versions
from vdit_sparse.app.generate import needs_full_warm_up
from vdit_sparse.app.loading import takes_encoded_text
from vdit_sparse.app.request import Request
from vdit_sparse.eval.baseline import Baseline
from vdit_sparse.eval.denoise import execution_device
from vdit_sparse.eval.measure import Chosen

VERSION = 1
NOISE = "a generator on the CPU with the row's seed, for every method: the same noise for all"
WARM_UP = (
    "before a method's first sample in a process, not timed: a step for each transformer, dense "
    "and sparse; kernels and graphs are compiled in it"
)
TIMING = (
    "denoise_seconds: from the first call of the transformer to the end of the last step, the "
    "device waited for at both; text encoder and VAE are outside; speedup: the dense run's over "
    "the sample's, same prompt, seed and process settings"
)
FRAMES = "metrics see the 8-bit frames of the decoder, before any video codec"


def protocol_of(pipe, request, settings: dict, chosen: Chosen, baseline: Baseline) -> dict:
    """The protocol of an `EvaluationRequest` on a loaded pipeline, as plain data.

    Of the machine it holds what changes seconds: the GPU, or the CPU and its threads.
    """
    device, suite = execution_device(pipe), request.suite
    described = machine(device)
    kept = ("gpu",) if device.type == "cuda" else ("processor", "threads")
    return {
        "version": VERSION,
        "suite": {"name": suite.name, "media": suite.media, "digest": suite.digest},
        "model": _model(pipe, request.model),
        "settings": {**settings, **_asked(pipe, request.model)},
        "noise": NOISE,
        "warm_up": WARM_UP,
        "timing": TIMING,
        "frames": FRAMES,
        "baseline": asdict(baseline),
        "metrics": list(chosen.names),
        "judge": chosen.judge is not None,
        "left_out": dict(chosen.left_out),
        "machine": {"device": device.type, **{name: described[name] for name in kept}},
        "versions": versions(),
    }


def _model(pipe, asked: Request) -> dict:
    from vdit_sparse.pipelines.attach import origin_of

    transformer = pipe.transformer or pipe.transformer_2
    origin = origin_of(pipe, "transformer", transformer)
    return {
        "name": origin.model if asked.model else "bundled",
        "pipeline": type(pipe).__name__,
        "transformer": type(transformer).__name__,
        "config": origin.config,
        "scheduler": origin.scheduler,
        "dtype": str(transformer.dtype).removeprefix("torch."),
    }


def _asked(pipe, asked: Request) -> dict:
    """What the command says beside the arguments of the pipeline's call."""
    return {
        **({} if asked.base is None else {"base": asked.base}),
        "negative_prompt": asked.negative_prompt,
        "image": None if asked.image is None else asked.image.name,
        "loras": [list(pair) for pair in asked.loras],
        "offload": asked.offload,
        "compile": asked.compile,
        "text_encoded_once": takes_encoded_text(pipe),
        "warmup_at_full_size": needs_full_warm_up(pipe, asked),
    }
