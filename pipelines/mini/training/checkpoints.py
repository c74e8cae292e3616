"""Where the stages meet: checkpoints to resume from, and the pipeline that diffusers loads."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from transformers import PreTrainedTokenizerFast

from vdit_sparse.pipelines.mini.training.models import (
    Sizes,
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_transformer,
)
from vdit_sparse.pipelines.mini.training.pacing import report

TOKENIZER = Path(__file__).parent.parent / "tokenizer"
GENERATION = TOKENIZER.parent / "generation.json"
# Transformers 5 calls it TokenizersBackend, a name that transformers 4 does not know.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
STAGES = ("autoencoder", "denoiser", "distill")


@dataclass(frozen=True)
class Checkpoints:
    """A folder with one resumable file per stage and the exported pipeline.

    Attributes:
        folder: created when first written to.
        tokenizer: folder of the trained tokenizer.
    """

    folder: Path
    tokenizer: Path = TOKENIZER

    def save(self, stage: str, state: dict) -> None:
        """Writes a stage's state; an interrupted write leaves the former file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._path(stage).with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._path(stage))
        report(f"saved {self._path(stage)}, {self._path(stage).stat().st_size / 1e6:.0f} MB")

    def load(self, stage: str) -> dict:
        """Returns what `save` wrote, on the CPU."""
        path = self._path(stage)
        if not path.is_file():
            raise FileNotFoundError(
                f"expected a checkpoint of stage {stage!r} at {path}, found none: "
                f"run that stage first, or 'adopt' an exported pipeline"
            )
        return torch.load(path, map_location="cpu", weights_only=True)

    @property
    def pipeline(self) -> Path:
        """Folder of the exported pipeline."""
        return self.folder / "mini"

    def _path(self, stage: str) -> Path:
        if stage not in STAGES:
            raise ValueError(f"expected a stage of {STAGES}, got {stage!r}")
        return self.folder / f"{stage}.pt"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer that stage `tokenizer` wrote."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"expected tokenizer.json in {folder}, found none: run stage 'tokenizer' first"
        )
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def load_autoencoder(checkpoints: Checkpoints, sizes: Sizes) -> AutoencoderKLWan:
    """Builds the averaged autoencoder with the latents' statistics in its config, frozen."""
    state = checkpoints.load("autoencoder")
    vae = build_autoencoder(sizes, state["mean"], state["std"])
    vae.load_state_dict(state["average"])
    return vae.eval().requires_grad_(False)


def assemble(checkpoints: Checkpoints, sizes: Sizes) -> WanPipeline:
    """Builds the stock pipeline from the averaged weights of both stages, float32 on the CPU."""
    state = checkpoints.load("denoiser")
    transformer, text_encoder = build_transformer(sizes), build_text_encoder(sizes)
    transformer.load_state_dict(state["transformer_average"])
    text_encoder.load_state_dict(state["text_encoder_average"])
    return WanPipeline(
        tokenizer=load_tokenizer(checkpoints.tokenizer),
        text_encoder=text_encoder.eval(),
        vae=load_autoencoder(checkpoints, sizes),
        scheduler=build_scheduler(),
        transformer=transformer.eval(),
    )


def export(pipeline: WanPipeline, folder: Path, shard: str = "14MB") -> int:
    """Saves the pipeline in bf16, with the bundled model's arguments of a call, and returns its
    size in bytes."""
    pipeline.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    (folder / GENERATION.name).write_bytes(GENERATION.read_bytes())
    _rename_tokenizer(folder / "model_index.json")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    report(f"exported {folder}: {size / 1e6:.1f} MB")
    return size


def name_tokenizer_class(config: Path) -> None:
    """Writes the portable class name into a `tokenizer_config.json`."""
    content = json.loads(config.read_text())
    content["tokenizer_class"] = TOKENIZER_CLASS
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _rename_tokenizer(index: Path) -> None:
    content = json.loads(index.read_text())
    content["tokenizer"] = ["transformers", TOKENIZER_CLASS]
    index.write_text(json.dumps(content, indent=2) + "\n")
    name_tokenizer_class(index.parent / "tokenizer" / "tokenizer_config.json")


def adopt(folder: Path, checkpoints: Checkpoints) -> None:
    """Turns an exported pipeline into checkpoints, so that training can go on from it.

    The optimizers' state is not in an export: the first steps warm up again.
    """
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    config = pipeline.vae.config
    weights = pipeline.vae.state_dict()
    checkpoints.save(
        "autoencoder",
        {
            "weights": weights,
            "average": weights,
            "mean": torch.tensor(config.latents_mean),
            "std": torch.tensor(config.latents_std),
            "step": 0,
        },
    )
    transformer, text_encoder = (
        pipeline.transformer.state_dict(),
        pipeline.text_encoder.state_dict(),
    )
    checkpoints.save(
        "denoiser",
        {
            "transformer": transformer,
            "transformer_average": transformer,
            "text_encoder": text_encoder,
            "text_encoder_average": text_encoder,
            "step": 0,
        },
    )
