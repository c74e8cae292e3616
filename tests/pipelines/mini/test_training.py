"""The training code at toy size: each stage runs, learns, resumes, exports a loadable pipeline."""

import json

import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch._dynamo.testing import CompileCounter

from vdit_sparse.pipelines.mini.training import train
from vdit_sparse.pipelines.mini.training.attention_speed import fastest_attention
from vdit_sparse.pipelines.mini.training.autoencoder import (
    frame_psnr,
    latent_statistics,
    reconstruction_loss,
)
from vdit_sparse.pipelines.mini.training.checkpoints import (
    TOKENIZER,
    Checkpoints,
    load_tokenizer,
)
from vdit_sparse.pipelines.mini.training.clips import ClipShape, Limit, crops, render, to_bytes
from vdit_sparse.pipelines.mini.training.denoiser import Denoiser, compile_blocks, flow_loss
from vdit_sparse.pipelines.mini.training.models import (
    RELEASED,
    TINY,
    build_autoencoder,
    build_text_encoder,
    build_transformer,
)
from vdit_sparse.pipelines.mini.training.muon import Muon, orthogonalise
from vdit_sparse.pipelines.mini.training.pacing import Average, Optimizers, Pace
from vdit_sparse.pipelines.mini.training.sample import PROMPTS, Sampling, sheet
from vdit_sparse.pipelines.mini.training.structure import (
    Recorder,
    RecordingProcessor,
    best_block_mass,
    measure,
    query_and_key,
    table,
)
from vdit_sparse.pipelines.mini.training.whole_clip import WholeClip

SHAPE = ClipShape(32, 64, 5, "cpu")
SIZE = ["--height", "32", "--width", "64", "--frames", "5", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are tiny: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(module, std=0.1):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread):
    """A folder in which the command line has run all stages at toy size."""
    folder = tmp_path_factory.mktemp("checkpoints")
    common = ["--folder", str(folder), "--tokenizer", str(folder / "words"), "--sizes", "tiny"]
    small = ["--batch", "2", "--clips", "4", "--long-clips", "2", "--seconds", "1"]
    train.main(["tokenizer", *common, "--captions", "200"])
    stage = ["autoencoder", *common, *SIZE, *small, "--crop", "32"]
    train.main([*stage, "then", *stage, "--resume"])
    train.main(["evaluate", *common, *SIZE, "--clips", "2"])
    stage = ["denoiser", *common, *SIZE, *small, "--no-compiled"]
    train.main([*stage, "then", *stage, "--resume", "then", "export", *common])
    return Checkpoints(folder, folder / "words")


def test_the_released_model_fits_its_budget():
    parts = (build_autoencoder, build_transformer, build_text_encoder)
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in build(RELEASED).parameters()) for build in parts]
    assert 15e6 < sizes[1] < 23e6
    assert 2 * sum(sizes) < 62.5e6  # bytes in bf16; 64 MB with tokenizer, sprites and code


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_one_pass_equals_the_chunks_of_diffusers(frames):
    vae = randomise(build_autoencoder(TINY)).requires_grad_(False)
    clip = WholeClip(vae)
    video = torch.rand(2, 3, frames, 32, 48) * 2 - 1
    posterior = vae.encode(video).latent_dist
    torch.testing.assert_close(clip.encode(video), posterior.parameters, rtol=1e-4, atol=1e-5)
    latents = torch.randn(2, 8, (frames + 3) // 4, 4, 6)
    decoded = clip.decode(latents).clamp(-1, 1)
    torch.testing.assert_close(decoded, vae.decode(latents).sample, rtol=1e-4, atol=1e-5)


def test_one_pass_refuses_what_it_cannot_do():
    clip = WholeClip(build_autoencoder(TINY))
    with pytest.raises(ValueError, match="4 k \\+ 1 frames"):
        clip.encode(torch.zeros(1, 3, 4, 32, 32))


def test_a_fresh_transformer_predicts_zero_and_closes_its_gates():
    model = Denoiser(TINY)
    tokens = torch.randint(3, 1024, (2, 64))
    velocity = model(torch.randn(2, 8, 2, 4, 8), torch.rand(2), tokens, 128)
    assert velocity.shape == (2, 8, 2, 4, 8)
    assert velocity.count_nonzero() == 0
    assert all(
        b.scale_shift_table[:, [2, 5]].count_nonzero() == 0 for b in model.transformer.blocks
    )


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_newton_schulz_flattens_the_singular_values(shape):
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
    assert singular.min() > 0.5
    assert singular.max() < 1.4


def test_muon_batches_by_shape_without_changing_the_result():
    start = [torch.randn(6, 4, 3, 3), torch.randn(6, 36), torch.randn(5, 7)]
    gradients = [torch.randn_like(tensor) for tensor in start]

    def run(groups):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        for members in groups:
            Muon([parameters[index] for index in members], lr=0.1, weight_decay=0.1).step()
        return parameters

    for one, alone in zip(run([(0, 1, 2)]), run([(0,), (1,), (2,)]), strict=True):
        torch.testing.assert_close(one, alone, rtol=1e-2, atol=1e-3)


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="give vectors and scalars to AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(4))])


def test_the_cosine_ends_when_the_time_does():
    assert Pace(1e-6, warm_up=1, final=0.02).factor(5) == pytest.approx(0.02)
    assert Pace(1e6, warm_up=10).factor(4) == pytest.approx(0.5)


def test_the_average_forgets_its_start_and_then_moves_slowly():
    module = torch.nn.Linear(2, 2)
    average = Average(module, decay=0.9)
    torch.nn.init.ones_(module.weight)
    average.update(module, step=0)
    assert (average.module.weight - 1).abs().max() < 0.1
    torch.nn.init.zeros_(module.weight)
    average.update(module, step=10_000)
    assert average.module.weight.min() > 0.8


def test_crops_are_places_of_the_clips():
    clips = torch.randint(256, (2, 3, 5, 32, 48), dtype=torch.uint8)
    found = to_bytes(crops(clips, 3, 16))
    assert found.shape == (3, 3, 5, 16, 16)
    windows = clips.unfold(3, 16, 1).unfold(4, 16, 1).permute(0, 3, 4, 1, 2, 5, 6).flatten(0, 2)
    assert all((windows == crop).flatten(1).all(1).any() for crop in found)
    with pytest.raises(ValueError, match="at most 32 pixels"):
        crops(clips, 1, 40)


def test_rendering_stops_at_its_limit():
    large = ClipShape(128, 224, 25, "cpu")
    batches = list(render(large, Limit(9), seed=0))
    assert [len(captions) for _, captions in batches] == [7, 2]
    assert batches[1][0].shape == (2, 3, 25, 128, 224)
    assert len(list(render(large, Limit(9, seconds=0.0), seed=0))) == 1


def test_psnr_of_a_known_error():
    first = torch.full((1, 3, 2, 4, 4), 100, dtype=torch.uint8)
    second = first.clone()
    second[:, :, 1] += 10
    torch.testing.assert_close(frame_psnr(first, second), torch.tensor([[100.0, 28.1308]]))


def test_the_autoencoder_overfits_a_clip():
    vae = build_autoencoder(TINY)
    clip, kernels = WholeClip(vae), [p for p in vae.parameters() if p.ndim == 5]
    optimizers = Optimizers(kernels, [p for p in vae.parameters() if p.ndim != 5], rate=4e-3)
    video = next(render(SHAPE, Limit(2), seed=0))[0]
    losses = []
    for _ in range(30):
        loss = reconstruction_loss(clip, video, 2e-6)
        optimizers.step(loss, 1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    mean, std = latent_statistics(clip, to_bytes(video))
    assert mean.shape == std.shape == (8,)
    assert std.min() > 0


def test_the_denoiser_overfits_a_latent():
    torch.manual_seed(1)
    model = Denoiser(TINY)
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    optimizers = Optimizers(matrices, [p for p in model.parameters() if id(p) not in chosen])
    latents = torch.randn(1, 8, 2, 4, 8).repeat(8, 1, 1, 1, 1)
    tokens = torch.randint(3, 1024, (8, 64))
    losses = []
    for step in range(60):
        loss = flow_loss(model, latents, tokens, (1.5, (64, 128)[step % 2]))
        optimizers.step(loss, 1.0)
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_one_compilation_serves_every_text_length():
    torch._dynamo.reset()
    counter = CompileCounter()
    model = Denoiser(TINY)
    compile_blocks(model.transformer, backend=counter)
    latents, tokens = torch.randn(1, 8, 2, 4, 8), torch.randint(3, 1024, (1, 64))
    for pad_length in (64, 226, 512):
        flow_loss(model, latents, tokens, (1.0, pad_length))
    assert counter.frame_count == 1


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
        assert all(torch.isfinite(v).all() for v in state.values() if isinstance(v, torch.Tensor))
    report = json.loads((trained.folder / "autoencoder.json").read_text())
    assert len(report["psnr_by_index"]) == SHAPE.frames
    assert report["psnr_worst_index"] <= report["psnr"] < 100


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
    small = ["--batch", "1", "--clips", "1", "--seconds", "0", "--no-compiled", "--resume"]
    train.main(["denoiser", *folder, *SIZE, *small])
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
    query, key = (x.transpose(1, 2) for x in query_and_key(attention, hidden, rotary))
    value = attention.to_v(hidden).unflatten(2, (1, -1)).transpose(1, 2)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    expected = attention(hidden, None, None, rotary)
    torch.testing.assert_close(attention.to_out[0](output.transpose(1, 2).flatten(2)), expected)


def test_block_mass_of_uniform_and_of_local_attention():
    query = torch.zeros(150, 8)
    mass = best_block_mass(query, torch.randn(150, 8), shares=(0.5, 1.0), block=50)
    torch.testing.assert_close(mass, torch.tensor([0.5, 1.0]))
    own_block = 100 * torch.eye(4).repeat_interleave(50, 0)
    mass = best_block_mass(own_block, own_block, shares=(0.25, 0.125), block=50)
    torch.testing.assert_close(mass, torch.tensor([1.0, 0.5]))


def test_structure_is_measured_at_three_steps_and_leaves_the_pipeline_alone(trained):
    pipeline = train.load(trained.pipeline, "cpu")
    found = measure(pipeline, PROMPTS[:1], SHAPE, Sampling(steps=16))
    assert sorted(found) == [(step, layer) for step in (2, 8, 13) for layer in (0, 1)]
    assert all(mass.shape == (1, 3) and 0 < mass.min() <= 1 for mass in found.values())
    processors = [block.attn1.processor for block in pipeline.transformer.blocks]
    assert all(type(processor) is WanAttnProcessor for processor in processors)
    assert "| 1 |" in table(found)


def test_the_recorder_counts_only_calls_with_the_prompt():
    recorder = Recorder(steps=(1,))
    seen = []
    for _ in range(6):
        recorder.start_call()
        seen.append(recorder.step)
    assert seen == [None, None, 1, None, None, None]
    assert RecordingProcessor(WanAttnProcessor(), 0, recorder).layer == 0


def test_the_cpu_has_one_attention_kernel():
    assert fastest_attention((1, 64, 1, 64), "cpu") == "native"


@pytest.mark.gpu
def test_compiled_training_on_a_gpu_matches_the_cpu():
    torch.manual_seed(0)
    model = randomise(Denoiser(TINY), 0.05)
    inputs = torch.randn(2, 8, 2, 4, 8), torch.rand(2), torch.randint(3, 1024, (2, 64)), 128
    expected = model(*inputs)
    compile_blocks(model.transformer.cuda())
    found = model.cuda()(*(x.cuda() for x in inputs[:3]), 128)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)
