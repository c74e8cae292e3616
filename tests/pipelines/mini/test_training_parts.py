"""The pieces of the training code: networks, optimizers, clips, losses, compilation."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.pipelines.mini.toys import SHAPE, randomise
from vdit_sparse.pipelines.mini.training.autoencoder import (
    AutoencoderSettings,
    frame_psnr,
    latent_statistics,
    reconstruction_loss,
)
from vdit_sparse.pipelines.mini.training.clips import ClipShape, Limit, crops, render, to_bytes
from vdit_sparse.pipelines.mini.training.denoiser import Denoiser, compile_blocks, flow_loss
from vdit_sparse.pipelines.mini.training.fused_attention import fuse_attention
from vdit_sparse.pipelines.mini.training.models import (
    RELEASED,
    TINY,
    build_autoencoder,
    build_text_encoder,
    build_transformer,
)
from vdit_sparse.pipelines.mini.training.muon import Muon, orthogonalise
from vdit_sparse.pipelines.mini.training.pacing import Average, Optimizers, Pace
from vdit_sparse.pipelines.mini.training.whole_clip import WholeClip


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
    settings, losses = AutoencoderSettings(), []
    for _ in range(30):
        loss = reconstruction_loss(clip, video, settings)
        optimizers.step(loss, 1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    mean, std = latent_statistics(clip, to_bytes(video))
    assert mean.shape == std.shape == (8,)
    assert std.min() > 0


def test_coarse_latents_are_asked_to_show_the_coarse_video():
    clip = WholeClip(build_autoencoder(TINY))
    video = next(render(SHAPE, Limit(1), seed=0))[0]
    losses = {}
    for weight in (0.0, 0.25, 1.0):
        torch.manual_seed(0)
        settings = AutoencoderSettings(coarse_weight=weight)
        losses[weight] = reconstruction_loss(clip, video, settings).item()
    coarse = losses[1.0] - losses[0.0]
    assert coarse > 0
    assert losses[0.25] == pytest.approx(losses[0.0] + 0.25 * coarse, rel=1e-4)


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


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_training_on_a_gpu_matches_the_cpu(fused):
    torch.manual_seed(0)
    model = randomise(Denoiser(TINY), 0.05)
    inputs = torch.randn(2, 8, 2, 4, 8), torch.rand(2), torch.randint(3, 1024, (2, 64)), 128
    expected = model(*inputs)
    if fused:
        fuse_attention(model.transformer)
    compile_blocks(model.transformer.cuda())
    found = model.cuda()(*(x.cuda() for x in inputs[:3]), 128)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)
