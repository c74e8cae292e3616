"""The Fréchet distance and CLIPScore, with networks made here."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.eval.metrics.clips import made
from vdit_sparse.eval.metrics import METRICS, FrechetDistance, clip_score

scipy_linalg = pytest.importorskip("scipy.linalg")


class Pooled(nn.Module):
    """Eight means of each picture or clip."""

    def forward(self, x):
        x = x.flatten(2).unfold(2, 64, 64).mean(-1)
        return x.flatten(1)[:, :8]


def frechet_by_hand(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy_linalg.sqrtm(a @ b).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)


@pytest.mark.parametrize("frames", [None, 4], ids=["FID", "FVD"])
def test_the_frechet_distance_is_its_definition(frames):
    videos = [torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8) for _ in range(8)]
    references = [(each // 2 + 40 * torch.rand(1)).byte() for each in videos]
    distance = FrechetDistance(Pooled(), features=8, frames=frames)
    for pair in zip(videos, references, strict=True):
        distance.update(*pair)

    def samples(of):
        if frames is None:
            return torch.cat(of)
        clips = [video[i : i + frames] for video in of for i in (0, 4)]  # the ninth is left out
        return torch.stack(clips).transpose(1, 2)

    features = [Pooled()(samples(of).float() / 255) for of in (videos, references)]
    assert distance.compute() == pytest.approx(frechet_by_hand(*features), rel=1e-4)


def test_the_frechet_distance_of_equal_sets_is_nothing():
    distance = FrechetDistance(Pooled(), features=8)
    video = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    distance.update(video, video)
    assert 0 <= distance.compute() < 1e-6


def test_the_frechet_distance_says_what_is_wrong():
    with pytest.raises(ValueError, match="at least two samples of each set, got 0 and 0"):
        FrechetDistance(Pooled(), features=8).compute()
    with pytest.raises(ValueError, match=r"returns \[samples, 9\], got \(2, 8\)"):
        FrechetDistance(Pooled(), features=9).update(made(2, 16, 16), made(2, 16, 16))
    with pytest.raises(ValueError, match="at least 4 frames, got 2"):
        FrechetDistance(Pooled(), 8, frames=4).update(made(2, 16, 16), made(2, 16, 16))


@pytest.fixture
def tiny_clip(tmp_path):
    """A random CLIP in a folder such as Hugging Face's cache has."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "models--openai--tiny"
    folder.mkdir()
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ends = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    text = sizes | ends | dict(vocab_size=40, max_position_embeddings=77)
    vision = sizes | dict(image_size=32, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    letters = "abcdefghijklmnop"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    image = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    kind = {"image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image | kind))
    special = {"bos_token": words[0], "eos_token": words[1], "unk_token": words[1]}
    special |= {"tokenizer_class": "CLIPTokenizer", "pad_token": words[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def test_clip_score_is_the_cosine(tiny_clip, monkeypatch):
    from transformers import CLIPModel, CLIPTokenizer

    monkeypatch.setattr(clip_score, "_folder", lambda: tiny_clip)
    metric = METRICS["clip_score"]
    assert metric.unavailable() is None
    # Squares of the processor's size: only its scaling of values is left to do.
    video = made(3, 32, 32)
    found = metric.per_frame(video, "abc dad")
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    tokens = CLIPTokenizer.from_pretrained(tiny_clip)("abc dad", return_tensors="pt")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        pictures = (video.float() / 255 - mean) / deviation
        seen = model.visual_projection(model.vision_model(pictures).pooler_output)
        read = model.text_projection(model.text_model(**tokens).pooler_output)
        expected = 100 * torch.cosine_similarity(seen, read).clamp(min=0)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def test_clip_score_downloads_nothing():
    if clip_score._folder() is None:
        assert "hf download openai/clip-vit-base-patch32" in METRICS["clip_score"].unavailable()
