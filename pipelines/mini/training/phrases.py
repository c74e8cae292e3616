"""Stage `phrases`: the text encoder learns that the order of words counts.

T5's attention has no scale, so its logits outgrow their positions when weights grow: the encoder of
recipe 2 gave "from left to right" and "from right to left" the same tokens' outputs, to a part in a
thousand. Here its queries are made small again and two heads of each layer look at the neighbours;
then it learns to answer as before, but "from left to right" as it answered "to the right", and to
tell words of the camera's clause from others.
"""

import copy
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from vdit_sparse.pipelines.mini.training.captions import sample_spec
from vdit_sparse.pipelines.mini.training.checkpoints import Checkpoints, load_tokenizer
from vdit_sparse.pipelines.mini.training.clips import ClipShape
from vdit_sparse.pipelines.mini.training.models import Sizes, build_text_encoder
from vdit_sparse.pipelines.mini.training.pacing import Meter, Pace, report

SIDES = re.compile(r"from (left|right) to (left|right)")
# Where the four words of `SIDES` lie among the three of "to the left".
_PLACES = (0, 1, 1, 2)
_SEED = 25_000_000
# Where a checkpoint of the denoiser has the text encoder.
_TEXT = ("text_encoder", "text_encoder_average")
# Buckets of T5's relative positions -1 and +1.
_BEFORE, _AFTER = 1, 17


@dataclass(frozen=True)
class PhrasesSettings:
    """How the text encoder is trained.

    Attributes:
        seconds: the whole stage.
        captions: drawn beforehand.
        batch: captions of a step.
        rate: AdamW's learning rate; ten times as much for the positions' biases. At 2e-3 the
            attention saturates again.
        queries: what the queries' weights are multiplied by at the start.
        camera: weight of telling the camera's words from others.
        final: learning-rate factor at the end.
    """

    seconds: float = 90.0
    captions: int = 20_000
    batch: int = 96
    rate: float = 1e-3
    queries: float = 0.05
    camera: float = 0.02
    final: float = 0.01


@dataclass(frozen=True)
class Lesson:
    """Captions and what to answer, all int64 `[N, L]` padded with zeros: tokens; those of the same
    caption in plain words; each token's place among these; whether it is one of the camera's
    clause."""

    tokens: Tensor
    plain: Tensor
    places: Tensor
    camera: Tensor

    def rows(self, index: Tensor) -> "Lesson":
        """The lesson of some captions, as long as the longest of them."""
        length = int((self.tokens[index] != 0).sum(1).max())  # plain words are never more
        parts = (self.tokens, self.plain, self.places, self.camera)
        return Lesson(*(part[index, :length] for part in parts))


def train_phrases(
    shape: ClipShape,
    sizes: Sizes,
    settings: PhrasesSettings,
    checkpoints: Checkpoints,
    resume: bool = False,
) -> list[float]:
    """Trains the denoiser checkpoint's averaged text encoder and writes it back, as weights and
    average; returns the mean losses on the way. resume: go on, without making queries small."""
    start = time.perf_counter()
    state = checkpoints.load("denoiser")
    teacher = build_text_encoder(sizes).to(shape.device)
    teacher.load_state_dict(state["text_encoder_average"])
    student = copy.deepcopy(teacher)
    teacher.requires_grad_(False)
    if not resume:
        loosen(student, settings.queries)
    probe = nn.Linear(sizes.text_dim, 2).to(shape.device)
    tokenizer = load_tokenizer(checkpoints.tokenizer)
    lesson = make_lesson(tokenizer, settings.captions, shape.device)
    report(f"{settings.captions} captions in {time.perf_counter() - start:.1f} s")
    optimizer = _optimizer(student, probe, settings.rate)
    pace = Pace(settings.seconds - (time.perf_counter() - start), warm_up=50, final=settings.final)
    meter, step = Meter("phrases", shape.device), 0
    while pace.fraction() < 1 or step == 0:
        index = torch.randint(len(lesson.tokens), (settings.batch,), device=shape.device)
        part = lesson.rows(index)
        error, camera = losses(student, teacher, probe, part)
        (error + settings.camera * camera).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * pace.factor(step)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        meter.add(error.detach(), settings.batch, step)
    meter.flush(step)
    weights = {name: tensor.cpu() for name, tensor in student.state_dict().items()}
    checkpoints.save("denoiser", state | dict.fromkeys(_TEXT, weights))
    return meter.losses


def loosen(encoder: UMT5EncoderModel, queries: float) -> None:
    """Multiplies the queries' weights, and lets head 0 of each layer look at the token before, head
    1 at the one after."""
    with torch.no_grad():
        for block in encoder.encoder.block:
            attention = block.layer[0].SelfAttention
            attention.q.weight *= queries
            attention.relative_attention_bias.weight[_BEFORE, 0] += 4
            attention.relative_attention_bias.weight[_AFTER, 1] += 4


def losses(
    student: UMT5EncoderModel, teacher: UMT5EncoderModel, probe: nn.Module, lesson: Lesson
) -> tuple[Tensor, Tensor]:
    """Squared error of the student's outputs against what the teacher says of the plain words, over
    the latter's square; cross-entropy of the probe's answer to: is this the camera's clause?"""
    with torch.no_grad():
        target = _states(teacher, lesson.plain)
        target = target.gather(1, lesson.places[..., None].expand(-1, -1, target.shape[-1]))
    real = lesson.tokens != 0
    states = _states(student, lesson.tokens)
    error = (states - target)[real].square().sum() / target[real].square().sum()
    return error, F.cross_entropy(probe(states[real]), lesson.camera[real])


def make_lesson(tokenizer: PreTrainedTokenizerFast, count: int, device: str) -> Lesson:
    """Draws captions: about a third of them go from one side to the other."""
    rng = np.random.default_rng(_SEED)
    rows = [_row(tokenizer, caption) for caption in _captions(rng, count)]
    length = max(len(part) for row in rows for part in row)
    padded = np.zeros((4, count, length), np.int64)
    for n, row in enumerate(rows):
        for padding, part in zip(padded[:, n], row, strict=True):
            padding[: len(part)] = part
    return Lesson(*torch.from_numpy(padded).to(device))


def _captions(rng: np.random.Generator, count: int) -> Iterator[str]:
    while count:
        caption = sample_spec(rng).caption
        if SIDES.search(caption) or rng.random() < 0.15:
            count -= 1
            yield caption


def _row(tokenizer: PreTrainedTokenizerFast, caption: str) -> tuple[list[int], ...]:
    """Tokens, those of the plain caption, places, camera of one caption."""
    tokens = tokenizer(caption).input_ids
    plain = tokenizer(SIDES.sub(r"to the \2", caption)).input_ids
    places, done = [], 0
    for found in SIDES.finditer(caption):
        begin = _length(tokenizer, caption[: found.start()])
        places += range(len(places) - done, begin - done)
        places += [begin - done + place for place in _PLACES]
        done += 1
    places += range(len(places) - done, len(tokens) - done)
    if len(places) != len(tokens) or len(plain) + done != len(tokens):
        raise ValueError(f"Expected one token a word in {caption!r}: train another tokenizer.")
    clause, rest = caption.rpartition(",")[::2]
    begin = _length(tokenizer, clause) if "camera" in rest else len(tokens)
    return tokens, plain, places, [int(n >= begin) for n in range(len(tokens))]


def _length(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Tokens of a text, its end not counted."""
    return len(tokenizer(text.rstrip()).input_ids) - 1


def _states(encoder: UMT5EncoderModel, tokens: Tensor) -> Tensor:
    return encoder(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state


def _optimizer(student: nn.Module, probe: nn.Module, rate: float) -> torch.optim.AdamW:
    named = dict(student.named_parameters())
    biases = [p for name, p in named.items() if "relative_attention_bias" in name]
    others = [p for name, p in named.items() if "relative_attention_bias" not in name]
    groups = [(others, rate), (biases, 10 * rate), (list(probe.parameters()), rate)]
    return torch.optim.AdamW(
        [{"params": params, "lr": peak, "peak": peak} for params, peak in groups], weight_decay=0.0
    )
