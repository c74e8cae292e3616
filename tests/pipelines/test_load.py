"""`load_pipeline`: files, folders and the Hub, and what it says when it cannot load."""

import json

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import save_file

from tests.tiny_models import WAN_CALL, tiny_wan
from vdit_sparse.pipelines import load, memory, single_file, sources
from vdit_sparse.pipelines.load import load_pipeline
from vdit_sparse.pipelines.memory import (
    GIB,
    OFFLOADS,
    check_fits,
    check_ram,
    component_bytes,
    fitting_offload,
    needed_bytes,
    place,
)

# Names in diffusers' Wan -> the authors' own; norm2 and norm3 change places.
ORIGINAL = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    "norm2": "norm_",
    "norm3": "norm2",
    "norm_.": "norm3.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan().save_pretrained(folder)
    return folder


def other_weights():
    """The weights of a Wan of the same sizes as the folder's, but not its weights."""
    model = tiny_wan().transformer
    torch.manual_seed(5)
    return {name: torch.randn_like(x) for name, x in model.state_dict().items()}


def in_authors_format(weights):
    renamed = {}
    for name, tensor in weights.items():
        whole = "head.modulation" if name == "scale_shift_table" else name
        for ours, theirs in ORIGINAL.items():
            whole = whole.replace(ours, theirs)
        renamed[whole.replace("scale_shift_table", "modulation")] = tensor.contiguous()
    return renamed


@pytest.mark.parametrize("renamed", [False, True], ids=["diffusers' names", "authors' names"])
def test_a_file_brings_the_transformer_and_a_folder_the_rest(renamed, folder, tmp_path):
    weights = other_weights()
    file = tmp_path / "wan.safetensors"
    save_file(in_authors_format(weights) if renamed else weights, file)
    pipe = load_pipeline(file, base=folder, dtype=torch.float32, device="cpu")
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    pipe.set_progress_bar_config(disable=True)
    assert pipe(**WAN_CALL).frames.shape == (1, 16, 5, 16, 16)


def test_diffusers_recognises_the_authors_files(tmp_path):
    file = tmp_path / "wan.safetensors"
    save_file(in_authors_format(other_weights()), file)
    assert single_file.base_of(file).startswith("Wan-AI/Wan2.1-")


def test_gguf_stays_quantised(folder, tmp_path):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "wan.gguf"
    writer = gguf.GGUFWriter(file, "wan")
    for name, tensor in in_authors_format(other_weights()).items():
        if tensor.ndim == 2 and tensor.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file):
        write()
    writer.write_tensors_to_file()
    writer.close()
    pipe = load_pipeline(file, base=folder, dtype=torch.float32, device="cpu")
    assert pipe.transformer.blocks[0].ffn.net[0].proj.weight.dtype == torch.uint8
    pipe.set_progress_bar_config(disable=True)
    assert pipe(**WAN_CALL).frames.isfinite().all()


def test_files_that_cannot_be_used_say_why(folder, tmp_path, monkeypatch):
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    (tmp_path / "wan.gguf").touch()
    monkeypatch.setattr(single_file.importlib.util, "find_spec", lambda name: None)
    for name, base, error, message in (
        ("none.safetensors", folder, FileNotFoundError, "no model file"),
        ("other.safetensors", None, ValueError, "name its pipeline with base="),
        ("other.safetensors", folder, ValueError, "has not the weights of .*WanTransformer3D"),
        ("broken.safetensors", None, ValueError, "is broken"),
        ("broken.safetensors", folder, ValueError, "has not the weights"),
        ("wan.gguf", folder, ImportError, "pip install gguf"),
    ):
        with pytest.raises(error, match=message):
            load_pipeline(tmp_path / name, base=base, device="cpu")


def answer(code):
    return httpx.Response(code, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (GatedRepoError("401", response=answer(401)), PermissionError, "is gated: .*hf auth login"),
        (RepositoryNotFoundError("404", response=answer(404)), FileNotFoundError, "no model"),
        (RemoteEntryNotFoundError("404", response=answer(404)), FileNotFoundError, "diffusers'"),
        (LocalEntryNotFoundError("no"), ConnectionError, "your network"),
        (OfflineModeIsEnabled("off"), ConnectionError, "HF_HUB_OFFLINE"),
        (httpx.ConnectTimeout("slow"), ConnectionError, "your network"),
        (HFValidationError("a//b"), ValueError, "owner/name"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_says_becomes_one_line(error, kind, message, monkeypatch):
    def breaks(repo, name):
        raise error

    monkeypatch.setattr(sources, "hf_hub_download", breaks)
    with pytest.raises(kind, match=message) as said:
        load_pipeline("Wan-AI/Wan2.1-T2V-14B", device="cpu")
    assert "Wan-AI/Wan2.1-T2V-14B" in str(said.value) and "\n" not in str(said.value)
    if kind is not PermissionError:
        assert "Did you mean Wan-AI/Wan2.1-T2V-14B-Diffusers?" in str(said.value)


def test_a_short_name_is_a_hub_id(tmp_path, monkeypatch):
    asked = []

    def finds(repo, name):
        asked.append((repo, name))
        (tmp_path / name).write_text('{"_class_name": "SanaPipeline"}')
        return tmp_path / name

    monkeypatch.setattr(sources, "hf_hub_download", finds)
    with pytest.raises(ValueError, match="not supported"):
        load_pipeline("wan2.2-t2v-a14b", device="cpu")
    assert asked == [("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "model_index.json")]


def test_models_without_sparse_attention_are_refused_with_the_reason(tmp_path):
    index = {
        "_class_name": "SanaPipeline",
        "transformer": ["diffusers", "SanaTransformer2DModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="its self-attention is linear"):
        load_pipeline(tmp_path, device="cpu")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_pipeline(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("gib", "offload"), [(100, "none"), (30, "model"), (20, "group"), (0.1, None)]
)
def test_the_fastest_offloading_that_fits_is_named(gib, offload):
    sizes = {"text_encoder": 11 * GIB, "transformer": 26 * GIB, "vae": GIB // 2}
    free = int(gib * GIB)
    assert fitting_offload(sizes, free) == offload
    if offload == "none":
        check_fits(sizes, "none", free)
        return
    advice = f"offload='{offload}'" if offload else "use a smaller model"
    with pytest.raises(MemoryError, match=rf"37\.5 GiB .*{free / GIB:.1f} GiB are free.*{advice}"):
        check_fits(sizes, "none", free)
    if offload:
        check_fits(sizes, offload, free)


def test_more_offloading_needs_less():
    sizes = {"a": 100, "b": 500}
    needed = [needed_bytes(sizes, offload) for offload in ("none", "model", "group")]
    assert needed == [600, 500, 10] and needed_bytes({}, "model") == 0


def test_weights_are_counted_by_component():
    pipe = tiny_wan()
    sizes = component_bytes(pipe)
    weights = sum(x.numel() * 4 for x in pipe.transformer.parameters())
    buffers = sum(x.nbytes for x in pipe.transformer.buffers())
    assert set(sizes) == {"text_encoder", "transformer", "vae"}
    assert sizes["transformer"] == weights + buffers


def test_weights_larger_than_the_ram_are_not_loaded(folder, monkeypatch):
    check_ram(folder)

    class Little:
        available = free = 1000

    monkeypatch.setattr(memory.psutil, "virtual_memory", Little)
    monkeypatch.setattr(memory.psutil, "swap_memory", Little)
    with pytest.raises(MemoryError, match="GiB of RAM are available"):
        load_pipeline(folder, device="cpu")


def test_offloading_needs_a_gpu(folder):
    for offload, message in (("model", "needs a GPU"), ("some", "offload must be one of")):
        with pytest.raises(ValueError, match=message):
            load_pipeline(folder, device="cpu", offload=offload)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_pipelines_run_on_a_gpu(offload, folder, monkeypatch):
    pipe = load_pipeline(folder, dtype=torch.float32, device="cuda", offload=offload)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(**WAN_CALL).frames.isfinite().all()
    monkeypatch.setattr(load.torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    with pytest.raises(MemoryError, match="use a smaller model"):
        place(tiny_wan(), offload, torch.device("cuda"))
