"""Stage `judge`: trains the judge on labelled renders and measures it on others."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import convert_conv3d_weight_memory_format

from vdit_sparse.pipelines.mini.training.autoencoder import mixed_precision
from vdit_sparse.pipelines.mini.training.checkpoints import Checkpoints, load_autoencoder
from vdit_sparse.pipelines.mini.training.clips import ClipShape, Limit, from_bytes
from vdit_sparse.pipelines.mini.training.judge import (
    FRAMES,
    JudgeNetwork,
    JudgeSizes,
    load_network,
    save_judge,
)
from vdit_sparse.pipelines.mini.training.judge_data import (
    AUTOENCODED_SEED,
    HELD_OUT_SEED,
    JUDGE_SEED,
    Pool,
    augment,
    fill_pool,
)
from vdit_sparse.pipelines.mini.training.judge_labels import (
    STATEMENTS,
    Score,
    has_moving_camera,
    labels,
    score,
    statements,
)
from vdit_sparse.pipelines.mini.training.models import Sizes
from vdit_sparse.pipelines.mini.training.pacing import Average, Meter, Optimizers, Pace, report
from vdit_sparse.pipelines.mini.training.whole_clip import WholeClip


@dataclass(frozen=True)
class JudgeSettings:
    """How the judge is trained; the defaults are meant for 90 seconds of one H200.

    Attributes:
        seconds: the whole stage, all rendering included; measuring and saving come on top.
        render_seconds: at most this long for rendering training clips, half of it for each kind.
        clips: plain clips to render and hold in memory (172 kB each).
        batch: clips a step.
        autoencoded_share: of each batch, clips that went through the autoencoder of stage
            `autoencoder`, so that its blur and its colours are known to the judge; 0 needs none.
        held_out: clips to measure on, rendered at `held_out_scale` times the training size.
        held_out_scale: 2 is the size of the bundled model's clips where training has half of it.
        label_smoothing: of every head's cross-entropy.
    """

    seconds: float = 90.0
    render_seconds: float = 30.0
    clips: int = 60_000
    batch: int = 256
    autoencoded_share: float = 0.25
    held_out: int = 512
    held_out_scale: int = 2
    label_smoothing: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.autoencoded_share < 1:
            raise ValueError(
                f"Expected autoencoded_share in [0, 1), got {self.autoencoded_share}: 0.25 puts a "
                "quarter of the clips through the autoencoder."
            )


@dataclass(frozen=True)
class JudgePools:
    """Training clips, plain and autoencoded, and the held-out ones of the same two kinds; the
    autoencoded ones are None without an autoencoder."""

    plain: Pool
    coded: Pool | None
    held_out: Pool
    held_out_coded: Pool | None

    def draw(self, settings: JudgeSettings) -> tuple[Tensor, Tensor]:
        """One training batch, before augmentation."""
        if self.coded is None:
            return self.plain.draw(settings.batch)
        coded = max(1, round(settings.batch * settings.autoencoded_share))
        parts = (self.plain.draw(max(1, settings.batch - coded)), self.coded.draw(coded))
        clips, answers = zip(*parts, strict=True)
        return torch.cat(clips), torch.cat(answers)


def train_judge(
    shape: ClipShape,
    sizes: Sizes,
    judge_sizes: JudgeSizes,
    settings: JudgeSettings,
    checkpoints: Checkpoints,
    folder: Path,
) -> list[float]:
    """Renders, trains, saves the judge in `folder`, and measures what was saved.

    shape: of the renders for training; plain ones have only the judge's eight frames.
    sizes: of the autoencoder. Returns the mean losses on the way.
    """
    start = time.perf_counter()
    pools = render_pools(shape, sizes, settings, checkpoints)
    layout = torch.channels_last_3d
    network = JudgeNetwork(judge_sizes).to(shape.device)
    convert_conv3d_weight_memory_format(network, layout)
    average = Average(network, decay=0.99)
    optimizers = _optimizers(network)
    pace = Pace(settings.seconds - (time.perf_counter() - start))
    meter, step = Meter("judge", shape.device), 0
    while pace.fraction() < 1 or not step:
        clips, answers = pools.draw(settings)
        clips = augment(clips).contiguous(memory_format=layout)
        with mixed_precision(shape.device):
            loss = judge_loss(network, clips, answers, settings.label_smoothing)
        optimizers.step(loss, pace.factor(step))
        average.update(network, step)
        step += 1
        meter.add(loss, len(clips), step)
    meter.flush(step)
    facts = {"trained": {"steps": step, **asdict(settings)}}
    save_judge(average.module, folder, facts)
    # Measured as loaded, so with weights rounded to what the file holds.
    network, config = load_network(folder)
    facts["held_out"] = measure_pools(network.to(shape.device), pools)
    size = save_judge(network, folder, {**config, **facts})
    report(f"judge in {folder}: {size / 1e6:.2f} MB, held out: {facts['held_out']}")
    return meter.losses


def render_pools(
    shape: ClipShape, sizes: Sizes, settings: JudgeSettings, checkpoints: Checkpoints
) -> JudgePools:
    """The clips of a training run; held-out ones have seeds of their own."""
    coder = None
    if settings.autoencoded_share:
        vae = load_autoencoder(checkpoints, sizes).to(shape.device)
        coder = WholeClip(vae)
    device = shape.device
    scale = settings.held_out_scale
    full = (scale * shape.height, scale * shape.width, shape.frames)
    held_out = Limit(settings.held_out)
    share = 0.5 if coder else 1.0
    limit = Limit(settings.clips, settings.render_seconds * share)
    # A motion spans the clip whatever its length, so eight frames are the judge's eight moments.
    plain = (shape.height, shape.width, FRAMES)
    pools = [
        fill_pool(plain, device, limit, JUDGE_SEED),
        None,
        fill_pool(full, device, held_out, HELD_OUT_SEED),
        None,
    ]
    if coder:
        size = (shape.height, shape.width, shape.frames)
        pools[1] = fill_pool(size, device, limit, AUTOENCODED_SEED, coder)
        pools[3] = fill_pool(full, device, held_out, HELD_OUT_SEED, coder)
    return JudgePools(*pools)


def judge_loss(
    network: JudgeNetwork, clips: Tensor, answers: Tensor, label_smoothing: float
) -> Tensor:
    """The mean over heads of their cross-entropies.

    clips: `[B, 3, 8, 64, 112]` in [-1, 1]; answers: `[B, heads]` class numbers.
    """
    logits = network(clips).values()
    losses = [
        F.cross_entropy(each.float(), answer, label_smoothing=label_smoothing)
        for each, answer in zip(logits, answers.unbind(1), strict=True)
    ]
    return torch.stack(losses).mean()


def measure_pools(network: JudgeNetwork, pools: JudgePools) -> dict:
    """Accuracy per row of a report on held-out clips: `renders`, those of them with a `static` and
    with a `moving` camera, and `autoencoded` if there are."""
    found = {"clips": len(pools.held_out.specs)}
    for name, pool in (("renders", pools.held_out), ("autoencoded", pools.held_out_coded)):
        if pool is not None:
            found[name] = _accuracies(measure(network, pool))
    for name, moving in (("static", False), ("moving", True)):
        found[name] = _accuracies(measure(network, _filmed(pools.held_out, moving)))
    return found


def _accuracies(rows: dict[str, Score]) -> dict[str, float]:
    every = {**rows, STATEMENTS: statements(rows)}
    return {row: each.accuracy for row, each in every.items() if each.asked}


def _filmed(pool: Pool, moving: bool) -> Pool:
    """The clips of a pool whose camera moves, or those where it does not."""
    chosen = [i for i, spec in enumerate(pool.specs) if has_moving_camera(spec) == moving]
    specs = tuple(pool.specs[i] for i in chosen)
    return Pool(pool.clips[chosen], pool.answers[chosen], specs)


@torch.no_grad()
def measure(network: JudgeNetwork, pool: Pool, batch: int = 64) -> dict[str, Score]:
    """The network's score on a pool, row by row, in float32."""
    answers = []
    for clips in pool.clips.split(batch):
        best = {name: each.argmax(1).tolist() for name, each in network(from_bytes(clips)).items()}
        answers += [
            {name: network.names[name][best[name][i]] for name in best} for i in range(len(clips))
        ]
    return score(answers, [labels(spec) for spec in pool.specs])


def _optimizers(network: JudgeNetwork) -> Optimizers:
    matrices = network.matrices()
    chosen = {id(p) for p in matrices}
    others = [p for p in network.parameters() if id(p) not in chosen]
    return Optimizers(matrices, others, muon_decay=0.02)
