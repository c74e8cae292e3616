"""Pieces of recipe 2: image latents, the decoder's own loss, ST-LPIPS, fused attention, average."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from tests.pipelines.mini.toys import published_st_lpips, randomise
from vdit_sparse.pipelines.mini.training.autoencoder import AutoencoderSettings, decoder_loss
from vdit_sparse.pipelines.mini.training.denoiser import Denoiser, compile_blocks, flow_loss
from vdit_sparse.pipelines.mini.training.fused_attention import fuse_attention
from vdit_sparse.pipelines.mini.training.models import TINY, build_autoencoder
from vdit_sparse.pipelines.mini.training.pacing import TimedAverage
from vdit_sparse.pipelines.mini.training.st_lpips import PerceptualDistance, convert_weights
from vdit_sparse.pipelines.mini.training.whole_clip import WholeClip


@pytest.fixture
def perceptual(tmp_path):
    published_st_lpips(tmp_path / "published.pth")
    convert_weights(tmp_path / "published.pth", tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@pytest.mark.parametrize("latent_frames", [1, 3])
def test_the_first_latents_of_a_clip_are_those_of_its_first_frames(latent_frames):
    vae = randomise(build_autoencoder(TINY)).requires_grad_(False)
    video = torch.rand(1, 3, 17, 32, 48) * 2 - 1
    start = video[:, :, : 4 * latent_frames - 3]
    whole = WholeClip(vae).encode(video)
    for alone in (WholeClip(vae).encode(start), vae.encode(start).latent_dist.parameters):
        torch.testing.assert_close(whole[:, :, :latent_frames], alone, rtol=1e-4, atol=1e-5)


def test_the_decoders_loss_leaves_the_encoder_alone(perceptual):
    vae = randomise(build_autoencoder(TINY))
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    settings = AutoencoderSettings(latent_noise=0.0, perceptual_frames=5, perceptual_weight=2.0)
    distance = PerceptualDistance(perceptual)
    loss = decoder_loss(WholeClip(vae), video, settings, distance)
    loss.backward()
    trained = {name.split(".")[0] for name, p in vae.named_parameters() if p.grad is not None}
    assert trained == {"decoder", "post_quant_conv"}
    plain = decoder_loss(WholeClip(vae), video, settings)
    decoded = WholeClip(vae).decode(WholeClip(vae).encode(video).chunk(2, 1)[0])
    pictures = [x.transpose(1, 2).flatten(0, 1) for x in (decoded, video)]
    torch.testing.assert_close(loss - plain, 2 * distance(*pictures).mean())


def test_noise_on_the_latents_changes_the_decoders_loss_only_if_wanted():
    vae = randomise(build_autoencoder(TINY)).requires_grad_(False)
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    losses = {
        noise: [
            decoder_loss(WholeClip(vae), video, AutoencoderSettings(latent_noise=noise)).item()
            for _ in range(2)
        ]
        for noise in (0.0, 0.5)
    }
    assert losses[0.0][0] == losses[0.0][1]
    assert losses[0.5][0] != losses[0.5][1]


def reference_st_lpips(weights, first, second):
    """The definition in float64: convolutions as sums over unfolded windows."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)

    def convolve(x, weight, bias, padding):
        side = weight.shape[-1]
        windows = F.pad(x, (padding,) * 4).unfold(2, side, 1).unfold(3, side, 1)
        return torch.einsum("bchwij,ocij->bohw", windows, weight) + bias.view(-1, 1, 1)

    def halve(x):
        windows = F.pad(x, (2,) * 4, mode="reflect").unfold(2, 3, 2).unfold(3, 3, 2)
        return torch.einsum("bchwij,i,j->bchw", windows, taps, taps)

    def pool(x):
        return x.unfold(2, 3, 1).unfold(3, 3, 1).amax((-2, -1))

    def features(x):
        x = (x.double() - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
        for layer, name in enumerate(("1.0", "2.5", "3.9", "4.11", "5.13")):
            key, padding = f"net.slice{name}", (2, 2, 1, 1, 1)[layer]
            x = halve(pool(x)) if layer in (1, 2) else x
            x = convolve(x, weights[f"{key}.weight"], weights[f"{key}.bias"], padding)
            x = (halve(x) if layer == 0 else x).clamp(min=0)
            yield x / x.norm(dim=1, keepdim=True).clamp(min=1e-9)

    pairs = enumerate(zip(features(first), features(second), strict=True))
    return sum(
        ((one - other) ** 2 * weights[f"lin{layer}.model.1.weight"]).sum(1).mean((1, 2))
        for layer, (one, other) in pairs
    )


def test_st_lpips_is_its_definition(perceptual):
    distance = PerceptualDistance(perceptual)
    first, second = torch.rand(2, 2, 3, 40, 36) * 2 - 1
    found = distance(first, second)
    expected = reference_st_lpips(load_file(perceptual), first, second)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    assert distance(first, first).count_nonzero() == 0
    assert not list(distance.parameters())


def test_st_lpips_says_what_is_missing(tmp_path, perceptual):
    with pytest.raises(FileNotFoundError, match="leave --perceptual out"):
        PerceptualDistance(tmp_path / "nothing.safetensors")
    torch.save({"net.slice1.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="alex_shift_tolerant.pth"):
        convert_weights(tmp_path / "other.pth", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="at least 32"):
        PerceptualDistance(perceptual)(*torch.zeros(2, 1, 3, 16, 64))


def test_fused_attention_is_the_stock_model_with_the_same_gradients():
    model = randomise(Denoiser(TINY), 0.05).double()
    names = list(model.state_dict())
    inputs = torch.randn(2, 8, 2, 4, 8).double(), torch.rand(2).double()
    inputs += torch.randint(3, 1024, (2, 64)), 128

    def run():
        model.zero_grad()
        output = model(*inputs)
        output.square().sum().backward()
        return output.detach(), [p.grad.clone() for p in model.transformer.blocks.parameters()]

    expected = run()
    fuse_attention(model.transformer)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-6)


def test_one_compilation_serves_every_text_length_of_fused_attention():
    torch._dynamo.reset()
    counter, model = CompileCounter(), Denoiser(TINY)
    fuse_attention(model.transformer)
    compile_blocks(model.transformer, backend=counter)
    tokens = torch.randint(3, 1024, (1, 64))
    for pad_length in (64, 226, 512):
        flow_loss(model, torch.randn(1, 8, 2, 4, 8), tokens, (1.0, pad_length))
    assert counter.frame_count == 1
    for _ in range(2):
        flow_loss(model, torch.randn(2, 8, 1, 4, 8), tokens.expand(2, -1), (1.0, 64))
    assert counter.frame_count == 2


def test_the_average_counts_seconds_not_steps():
    def follow(times):
        module = torch.nn.Linear(1, 1, bias=False)
        average = TimedAverage(module, seconds=10.0)
        torch.nn.init.zeros_(average.module.weight)
        torch.nn.init.ones_(module.weight)
        average.trained = 1000.0
        for seconds in times:
            average.update(module, 1000.0 + seconds)
        return average.module.weight.item()

    assert follow([5.0]) == pytest.approx(1 - math.exp(-0.5))
    assert follow([1.0, 2.0, 3.5, 5.0]) == pytest.approx(follow([5.0]))


def test_a_young_average_forgets_its_start():
    module = torch.nn.Linear(1, 1, bias=False)
    average = TimedAverage(module, seconds=100.0)
    torch.nn.init.constant_(module.weight, 7.0)
    average.update(module, 0.1)
    assert average.module.weight.item() == pytest.approx(7.0, rel=1e-3)
