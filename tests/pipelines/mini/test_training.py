"""The training code at toy size: each stage runs, learns, resumes, exports a loadable pipeline."""

import json

import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from tests.pipelines.mini.toys import SHAPE, published_st_lpips, randomise
from vdit_sparse.pipelines.load import default_dtype
from vdit_sparse.pipelines.mini.training import train
from vdit_sparse.pipelines.mini.training.attention_speed import fastest_attention
from vdit_sparse.pipelines.mini.training.checkpoints import (
    TOKENIZER,
    Checkpoints,
    load_tokenizer,
)
from vdit_sparse.pipelines.mini.training.denoiser import Denoiser
from vdit_sparse.pipelines.mini.training.models import (
    RELEASED,
    TINY,
    build_transformer,
)
from vdit_sparse.pipelines.mini.training.sample import PROMPTS, Sampling, sheet
from vdit_sparse.pipelines.mini.training.st_lpips import convert_weights
from vdit_sparse.pipelines.mini.training.structure import (
    Recorder,
    RecordingProcessor,
    best_blocks,
    block_masses,
    mass_in_best,
    measure,
)
from vdit_sparse.pipelines.mini.training.structure_tables import every_head, numbers, summary
from vdit_sparse.pipelines.wan_attention import query_key_value

SIZE = ["--height", "32", "--width", "64", "--frames", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread):
    """A folder in which the command line has run all stages at toy size."""
    folder = tmp_path_factory.mktemp("checkpoints")
    common = ["--folder", str(folder), "--tokenizer", str(folder / "words"), "--sizes", "tiny"]
    small = ["--batch", "2", "--clips", "4", "--long-clips", "2", "--seconds", "1"]
    train.main(["tokenizer", *common, "--captions", "200"])
    published_st_lpips(folder / "published.pth")
    convert_weights(folder / "published.pth", folder / "st_lpips.safetensors")
    stage = ["autoencoder", *common, *SIZE, *small, "--crop", "32"]
    late = ["--perceptual", str(folder / "st_lpips.safetensors"), "--perceptual-frames", "2"]
    train.main([*stage, "then", *stage, "--resume", *late, "--decoder-from", "0.5"])
    train.main(["evaluate", *common, *SIZE, "--clips", "2"])
    stage = ["denoiser", *common, *SIZE, *small, "--no-compiled"]
    two = "32x64 seconds=0.5 keep_latents=1 stills=2 / 48x64x5 image_frames=1,2 images_end=0.7"
    train.main([*stage, "--stages", two])
    train.main([*stage, "--resume", "then", "export", *common])
    return Checkpoints(folder, folder / "words")


def test_text_is_encoded_as_the_pipeline_does(trained):
    pipeline = WanPipeline.from_pretrained(
        trained.pipeline, dtype=torch.float32, local_files_only=True
    )
    model = Denoiser(TINY)
    model.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
    theirs, _ = pipeline.encode_prompt(PROMPTS[0], None, False, max_sequence_length=64)
    tokens = pipeline.tokenizer(
        [PROMPTS[0]], padding="max_length", max_length=64, return_tensors="pt"
    ).input_ids
    ours = model.encode_text(tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours[0, -1].count_nonzero() == 0


def test_the_tokenizer_lowers_case_ends_texts_and_takes_any_text(trained):
    pipeline = WanPipeline.from_pretrained(trained.pipeline, local_files_only=True)
    upper, lower, strange = pipeline.tokenizer(
        ["A Red Fox", "a red fox", "ünïcødé 狐 🦊"]
    ).input_ids
    assert upper == lower
    assert upper[-1] == pipeline.tokenizer.eos_token_id == 1
    assert pipeline.tokenizer.unk_token_id not in strange
    assert pipeline.tokenizer.pad_token_id == 0


def test_the_released_tokenizer_knows_the_words_of_the_prompts():
    tokenizer = load_tokenizer(TOKENIZER)
    for prompt in PROMPTS:
        words = prompt.replace(",", " ,").split()
        assert len(tokenizer(prompt).input_ids) == len(words) + 1
    assert len(tokenizer) <= RELEASED.vocabulary


def test_stages_count_their_steps_and_measure(trained):
    for stage in ("autoencoder", "denoiser"):
        state = trained.load(stage)
        assert state["step"] >= 2
        assert 0 < state["trained"] < 10
        assert all(torch.isfinite(v).all() for v in state.values() if isinstance(v, torch.Tensor))
    report = json.loads((trained.folder / "autoencoder.json").read_text())
    assert len(report["psnr_by_index"]) == SHAPE.frames
    assert report["psnr_worst_index"] <= report["psnr"] < 100


def test_kept_latents_lie_beside_the_checkpoints(trained):
    names = sorted(path.name for path in (trained.folder / "latents").iterdir())
    assert names == ["32x64x1.pt", "32x64x5.pt", "32x64x9.pt"]


def test_the_export_loads_with_plain_diffusers_and_generates(trained):
    index = json.loads((trained.pipeline / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    config = json.loads((trained.pipeline / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    pipeline = WanPipeline.from_pretrained(
        trained.pipeline, dtype=torch.bfloat16, local_files_only=True
    )
    assert pipeline.vae.config.latents_mean == trained.load("autoencoder")["mean"].tolist()
    clip = train.load(trained.pipeline, "cpu")
    sampling = Sampling(steps=2)
    frames = train.sample_sheet(clip, SHAPE, sampling, trained.folder / "sheet.png")
    assert frames[0].shape == (5, 32, 64, 3)
    assert all(frame.std() > 0 for frame in frames)


def test_training_goes_on_from_an_export(trained, tmp_path):
    folder = ["--folder", str(tmp_path), "--tokenizer", str(trained.tokenizer), "--sizes", "tiny"]
    train.main(["adopt", *folder, "--pipeline", str(trained.pipeline)])
    small = ["--batch", "1", "--clips", "1", "--long-clips", "0", "--seconds", "0"]
    train.main(["denoiser", *folder, *SIZE, *small, "--no-compiled", "--resume"])
    adopted, before = Checkpoints(tmp_path).load("denoiser"), trained.load("denoiser")
    assert adopted["step"] == 1
    name = "proj_out.bias"
    torch.testing.assert_close(
        adopted["transformer"][name], before["transformer_average"][name], atol=5e-2, rtol=0
    )


def test_a_missing_checkpoint_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="run that stage first"):
        Checkpoints(tmp_path).load("denoiser")


def test_the_sheet_has_a_row_per_clip():
    clips = [torch.rand(5, 32, 64, 3).numpy()] * 2
    assert sheet(clips, ("one", "two")).size == (5 * 224, 2 * (112 + 14))


def test_recorded_queries_and_keys_are_those_of_the_stock_processor():
    transformer = randomise(build_transformer(TINY)).requires_grad_(False)
    attention = transformer.blocks[0].attn1
    hidden = torch.randn(1, 16, 64)
    rotary = transformer.rope(torch.randn(1, 8, 2, 4, 8))
    found = query_key_value(attention, hidden, rotary)[:2]
    query, key = (x.transpose(1, 2) for x in found)
    value = attention.to_v(hidden).unflatten(2, (1, -1)).transpose(1, 2)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    expected = attention(hidden, None, None, rotary)
    torch.testing.assert_close(attention.to_out[0](output.transpose(1, 2).flatten(2)), expected)


def test_block_mass_of_uniform_and_of_local_attention():
    query = torch.zeros(150, 8)
    masses = block_masses(query, torch.randn(150, 8), block=50)
    torch.testing.assert_close(masses, torch.full((3, 3), 1 / 3))
    torch.testing.assert_close(mass_in_best(masses, (0.5, 1.0)), torch.tensor([0.5, 1.0]))
    own_block = 100 * torch.eye(4).repeat_interleave(50, 0)
    masses = block_masses(own_block, own_block, block=50)
    torch.testing.assert_close(mass_in_best(masses, (0.25, 0.125)), torch.tensor([1.0, 0.5]))
    assert best_blocks(masses, 0.25).equal(torch.eye(4).bool())
    assert best_blocks(masses, 0.01).sum(1).eq(1).all()


def test_stable_are_the_best_blocks_that_stay():
    recorder = Recorder(steps=(1,))
    masses = torch.eye(8).expand(2, 8, 8) + 0.5 * torch.eye(8).roll(1, 1)
    moved = masses.clone()
    moved[1, :4] = moved[1, :4].roll(4, 1)
    for call, now in ((2, masses), (4, moved)):
        recorder.calls = call
        recorder.record(0, now)
    (stable,) = recorder.stability[1, 0]
    assert stable.tolist() == [1.0, 0.5]
    assert list(recorder.mass) == [(1, 0)]


def test_structure_is_measured_at_three_steps_and_leaves_the_pipeline_alone(trained):
    pipeline = train.load(trained.pipeline, "cpu")
    found = measure(pipeline, PROMPTS[:1], SHAPE, Sampling(steps=16))
    places = [(step, layer) for step in (2, 8, 13) for layer in (0, 1)]
    assert sorted(found.mass) == sorted(found.stability) == places
    assert all(mass.shape == (1, 3) and 0 < mass.min() <= 1 for mass in found.mass.values())
    assert all(0 <= each.min() <= each.max() <= 1 for each in found.stability.values())
    processors = [block.attn1.processor for block in pipeline.transformer.blocks]
    assert all(type(processor) is WanAttnProcessor for processor in processors)
    assert summary(found).count("\n| 13 |") == 4
    assert every_head(found).count("\n| 1 | 0 |") == 1
    rows = numbers(found)
    assert len(rows) == 6 and rows[-1]["mass"] == found.mass[13, 1][0].tolist()


def test_reports_have_what_a_number_needs_beside_it(trained):
    common = ["--folder", str(trained.folder), *SIZE]
    words = ["time", *common, "--steps", "1", "--repeats", "2", "then", "structure", *common]
    train.main([*words, "--steps", "4"])
    timed = json.loads((trained.folder / "time.json").read_text())
    assert len(timed["seconds"]) == 2 and min(timed["seconds"]) > 0
    kind = str(default_dtype(torch.device("cpu"))).removeprefix("torch.")
    assert f"| 5 x 32 x 64 | {kind} | 1 | 4 |" in timed["markdown"]
    assert timed["command"].endswith(f" time {' '.join(words[1:])} --steps 4")
    assert {"machine", "torch", "triton", "commit"} <= set(timed)
    structure = json.loads((trained.folder / "structure-5-frames.json").read_text())
    assert {row["step"] for row in structure["numbers"]} == {2}
    assert "<summary>Every head</summary>" in structure["markdown"]
    evaluated = json.loads((trained.folder / "autoencoder.json").read_text())
    assert "dB on 2 held-out clips of 5 frames at 32x64" in evaluated["markdown"]


def test_the_recorder_counts_only_calls_with_the_prompt():
    recorder = Recorder(steps=(1,))
    seen = []
    for _ in range(6):
        recorder.start_call()
        seen.append(recorder.step)
    assert seen == [None, None, 1, None, 2, None]
    assert RecordingProcessor(WanAttnProcessor(), 0, recorder).layer == 0


def test_the_cpu_has_one_attention_kernel():
    assert fastest_attention((1, 64, 1, 64), "cpu") == "native"
