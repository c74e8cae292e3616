"""Forward passes of networks whose weights come in packages, with random weights and real ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.eval.metrics.clips import made, real
from vdit_sparse.eval.metrics import METRICS, lpips, mobilenet, rife
from vdit_sparse.eval.metrics.parts.sources import package_file

# torchvision's layouts: "M" is a max-pool; features are taken after these ReLUs.
ALEX = [(64, 11, 4, 2), "M", (192, 5, 1, 2), "M", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)]
VGG = [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3]


def trunk_of(name) -> tuple[nn.Sequential, list[int]]:
    """The trunk in torchvision's layout, so that its keys are those of the published file, and the
    indices of the layers whose outputs are compared."""
    layers, channels, taps = [], 3, []
    if name == "alex":
        for entry in ALEX:
            if entry == "M":
                layers.append(nn.MaxPool2d(3, 2))
            else:
                layers += [nn.Conv2d(channels, *entry), nn.ReLU()]
                channels = entry[0]
                taps.append(len(layers) - 1)
        return nn.Sequential(*layers), taps
    for stage in VGG:
        layers += [nn.MaxPool2d(2, 2)] if layers else []
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        taps.append(len(layers) - 1)
    return nn.Sequential(*layers), taps


def lpips_by_hand(trunk, taps, heads, one, other):
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def features(frames):
        # The published shift and scale are ImageNet's, rounded, for values in [-1, 1].
        shift, scale = (torch.tensor(x).view(3, 1, 1) for x in (mean, deviation))
        shift, scale = (2 * shift - 1).mul(1000).round() / 1000, 2 * scale
        hidden, found = (frames.float() / 127.5 - 1 - shift) / scale, []
        for index, layer in enumerate(trunk):
            hidden = layer(hidden)
            if index in taps:
                found.append(F.normalize(hidden, dim=1, eps=1e-10))
        return found

    pairs = zip(features(one), features(other), heads, strict=True)
    return sum(F.conv2d((x - y) ** 2, head).mean((1, 2, 3)) for x, y, head in pairs)


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_lpips_is_its_definition(name, monkeypatch, tmp_path):
    trunk, taps = trunk_of(name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metric = METRICS[f"lpips_{name}"]
    assert str(tmp_path / "checkpoints") in metric.unavailable()
    file = lpips.trunk_file(name)
    file.parent.mkdir()
    unused = {"classifier.1.weight": torch.zeros(1)}
    torch.save({f"features.{key}": x for key, x in trunk.state_dict().items()} | unused, file)
    assert metric.unavailable() is None
    published = package_file("torchmetrics", f"functional/image/lpips_models/{name}.pth")
    heads = torch.load(published, map_location="cpu", weights_only=True)
    one, other = made(2, 64, 72), made(2, 64, 72)
    with torch.no_grad():
        weights = [heads[f"lin{layer}.model.1.weight"] for layer in range(5)]
        expected = lpips_by_hand(trunk, taps, weights, one, other)
    found = metric.per_frame(one, other)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert found.min() > 0 and metric(one, one) == 0


def available(name):
    metric = METRICS[name]
    if reason := metric.unavailable():
        pytest.skip(reason)
    return metric


def test_st_lpips_with_the_published_weights():
    metric = available("st_lpips")
    pair = real("carphone_distorted", 2), real("carphone_pristine", 2)
    # Recorded from another reader of the same weights, in float64.
    assert metric.per_frame(*pair).tolist() == pytest.approx([0.208604, 0.209696], abs=1e-5)
    shifted = pair[1].roll(1, 3)
    assert metric(shifted, pair[1]) < 0.05


class Bottleneck(nn.Module):
    def __init__(self, before, after, stride, expansion):
        super().__init__()
        wide, layers = before * expansion, []
        if expansion > 1:
            layers += [nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)]
        layers += [nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after)]
        self.conv, self.residual = nn.Sequential(*layers), stride == 1 and before == after

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Sandler et al., table 2, up to the last convolution."""

    def __init__(self):
        super().__init__()
        layers, before = [self.layer(3, 32, 3, 2)], 32
        table = "1 16 1 1, 6 24 2 2, 6 32 3 2, 6 64 4 2, 6 96 3 1, 6 160 3 2, 6 320 1 1"
        for row in table.split(", "):
            expansion, after, repetitions, stride = map(int, row.split())
            for repetition in range(repetitions):
                layers.append(Bottleneck(before, after, 1 if repetition else stride, expansion))
                before = after
        self.features = nn.Sequential(*layers, self.layer(320, 1280, 1, 1))

    def layer(self, before, after, side, stride):
        convolution = nn.Conv2d(before, after, side, stride, side // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU6())

    def forward(self, x):
        return self.features(x).mean((2, 3))


@torch.no_grad()
def test_mobilenet_features_are_those_of_its_table():
    network = MobileNetV2().eval()
    for name, buffer in network.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(0.05, 0.3)
    pictures = mobilenet.prepared(made(2, 50, 90))
    assert pictures.shape == (2, 3, 224, 224)
    found = mobilenet.features(network.state_dict(), pictures)
    assert found.std() > 1e-3
    torch.testing.assert_close(found, network(pictures), rtol=1e-4, atol=1e-6)


def test_mobilenet_consistency_is_vbenchs_formula(monkeypatch):
    angles = torch.tensor([0.0, 1.0, 2.5])
    vectors = torch.stack([angles.cos(), angles.sin()], 1) * 7
    monkeypatch.setattr(mobilenet, "_weights", lambda device: {})
    monkeypatch.setattr(mobilenet, "features", lambda weights, pictures: vectors)
    found = mobilenet.mobilenet_consistency_per_frame(made(3, 32, 32))
    one, next_one = angles[1].cos(), (angles[2] - angles[1]).cos()
    # The last frame points away from the first: counted as 0.
    assert found.tolist() == pytest.approx([one.item(), next_one.item() / 2])


def test_mobilenet_with_the_published_weights():
    metric = available("mobilenet_consistency")
    expected = [0.988190, 0.992294]
    assert metric.per_frame(real("carphone_pristine", 3)).tolist() == pytest.approx(
        expected, abs=1e-4
    )


CHANNELS = {"block0": (7, 8), "block1": (12, 6), "block2": (12, 4), "block3": (12, 4)}


class RifeBlock(nn.Module):
    def __init__(self, before, width):
        super().__init__()

        def layer(before, after, stride):
            return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.PReLU(after))

        self.conv0 = nn.Sequential(layer(before, width // 2, 2), layer(width // 2, width, 2))
        self.convblock = nn.Sequential(*(layer(width, width, 1) for _ in range(8)))
        self.lastconv = nn.ConvTranspose2d(width, 5, 4, 2, 1)

    def forward(self, x, flow, scale):
        def resized(x, size):
            return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

        size = x.shape[-2:]
        small = [side // scale for side in size]
        x = resized(x, small)
        if flow is not None:
            x = torch.cat([x, resized(flow, small) / scale], 1)
        x = self.conv0(x)
        x = resized(self.lastconv(self.convblock(x) + x), size)
        return x[:, :4] * scale * 2, x[:, 4:5]


def warped_by_hand(frame, flow):
    """Bilinear look-up at x + flow, border repeated, without grid_sample."""
    _, _, height, width = frame.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = (x + flow[0, 0]).clamp(0, width - 1)
    y = (y + flow[0, 1]).clamp(0, height - 1)
    x0, y0 = x.floor().long().clamp(max=width - 2), y.floor().long().clamp(max=height - 2)
    u, v = x - x0, y - y0
    take = lambda dy, dx: frame[0][:, y0 + dy, x0 + dx]  # noqa: E731
    top, bottom = take(0, 0) * (1 - u) + take(0, 1) * u, take(1, 0) * (1 - u) + take(1, 1) * u
    return (top * (1 - v) + bottom * v)[None]


def rife_by_hand(blocks, before, after, scales):
    moment, flow, mask = torch.full_like(before[:, :1], 0.5), None, None
    parts = [before, after, moment]
    for block, scale in zip(blocks, scales, strict=True):
        change, mask_change = block(torch.cat(parts, 1), flow, scale)
        flow = change if flow is None else flow + change
        mask = mask_change if mask is None else mask + mask_change
        pair = warped_by_hand(before, flow[:, :2]), warped_by_hand(after, flow[:, 2:])
        parts = [*pair, moment, mask]
    return pair[0] * mask.sigmoid() + pair[1] * (1 - mask.sigmoid())


@torch.no_grad()
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
def test_rife_guesses_as_defined(far):
    blocks = nn.ModuleDict({name: RifeBlock(*sizes) for name, sizes in CHANNELS.items()})
    if far:
        blocks["block1"].lastconv.bias.fill_(5)  # corrections of more than 32 pixels
    weights = {f"module.{name}": x for name, x in blocks.state_dict().items()}
    before, after = (made(1, 64, 128).float() / 255 for _ in range(2))
    scales = (16, 8, 4, 2) if far else (8, 4, 2, 1)
    expected = rife_by_hand(blocks.values(), before, after, scales)
    torch.testing.assert_close(rife.between(weights, before, after), expected, atol=1e-4, rtol=0)


def test_rife_smoothness_compares_every_second_frame(monkeypatch):
    monkeypatch.setattr(rife, "_weights", lambda device: {})
    monkeypatch.setattr(rife, "between", lambda weights, before, after: (before + after) / 2)
    video = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    video[2], video[3] = 100, 90
    found = rife.rife_smoothness_per_frame(video)
    assert found.tolist() == pytest.approx([1 - 50 / 255, 1 - 40 / 255])


def test_rife_with_the_published_weights():
    metric = available("rife_smoothness")
    clip = real("carphone_pristine", 5)
    assert metric.per_frame(clip).tolist() == pytest.approx([0.9868, 0.9849], abs=2e-4)
    assert metric(clip) > metric(clip[[0, 4, 1, 3, 2]])
