"""Calibration files: what is kept, what is refused, and for which runs they are taken."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vdit_sparse import calibration as module
from vdit_sparse.calibration import (
    ENTRIES,
    HEADER,
    CalibratedAttention,
    Calibration,
    CalibrationWarning,
    load,
    read_header,
    save,
)
from vdit_sparse.call import Call, Origin
from vdit_sparse.grid import Grid

ORIGIN = Origin(model="makers/model", config="a1b2", scheduler="Euler")


def made(path: Path, **changes) -> Calibration:
    """A calibration for two layers and five steps."""
    tensors = {
        "transformer.modes": torch.arange(10, dtype=torch.int8).view(5, 2),
        "transformer_2.share": torch.rand(3, 4).T,
    }
    values = {
        "method": "Planted",
        "fields": {"block": 64, "epsilon": float("inf"), "bins": "half", "alpha": None},
        "origin": ORIGIN,
        "grid": Grid(3, 4, 5, 6),
        "layers": 2,
        "steps": 5,
        "prompts": ("a cat", "“ein Hund”"),
        "seeds": (0, 2**40),
        "versions": {"torch": "2.11", "triton": None},
        "tensors": tensors,
        **changes,
    }
    calibration = Calibration(path=str(path), **values)
    save(calibration)
    return calibration


@dataclass(frozen=True, kw_only=True)
class Planted(CalibratedAttention):
    """A method that reads no plan."""

    def plan(self, q, k, call):
        raise NotImplementedError


def call_of(**changes) -> Call:
    values = {"grid": Grid(3, 4, 5, 6), "layer": 0, "layers": 2, "step": 0, "steps": 5}
    return Call(**{**values, "memory": {}, "origin": ORIGIN, **changes})


def header_of(path: Path, **changes) -> None:
    """Writes a file whose header is a good one with some entries changed, or without them (...)."""
    made(path)
    header = {**read_header(path), **changes}
    header = {name: value for name, value in header.items() if value is not ...}
    save_file({"transformer.x": torch.zeros(1)}, path, {HEADER: json.dumps(header)})


def test_a_file_gives_back_what_was_saved(tmp_path):
    saved = made(tmp_path / "new" / "folder" / "x.safetensors")
    read = load(saved.path)
    for name in (*set(ENTRIES) - {"format"}, "path"):
        assert getattr(read, name) == getattr(saved, name), name
    assert read.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)
    assert [file.name for file in Path(saved.path).parent.iterdir()] == ["x.safetensors"]


def test_tensors_may_share_memory(tmp_path):
    shared = torch.arange(12.0)
    tensors = {"a.x": shared, "b.x": shared, "a.y": shared[3:7], "a.z": shared.view(3, 4).T}
    made(tmp_path / "x.safetensors", tensors=tensors)
    for name, tensor in load(tmp_path / "x.safetensors").tensors.items():
        assert torch.equal(tensor, tensors[name])


def test_tensors_are_found_by_expert(tmp_path):
    found = made(tmp_path / "x.safetensors")
    assert found.tensor("modes", "transformer").shape == (5, 2)
    with pytest.raises(ValueError, match="no 'modes' of 'transformer_2', only of transformer, tr"):
        found.tensor("modes", "transformer_2")


def test_a_file_that_is_cut_off_says_so(tmp_path):
    path = tmp_path / "x.safetensors"
    made(path)
    whole = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, 100, len(whole) - 1, *range(0, len(whole), 97)}
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is no calibration file, or is cut off"):
            load(path)


@pytest.mark.parametrize("content", [b"", b"words\n" * 9, b"PK\x03\x04" * 9, b"\x80\x04." * 9])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="is no calibration file"):
        load(tmp_path / "x")


@pytest.mark.parametrize("metadata", [None, {HEADER: "no JSON"}, {HEADER: "[1]"}, {HEADER: "1"}])
def test_other_safetensors_are_refused(tmp_path, metadata):
    save_file({"weight": torch.zeros(2)}, tmp_path / "x", metadata)
    with pytest.raises(ValueError, match="is no calibration file"):
        load(tmp_path / "x")


def test_nothing_is_unpickled(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "x")
    with pytest.raises(ValueError, match="is no calibration file"):
        load(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no calibration file .*absent\.safetensors"):
        load(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        Planted(calibration=str(tmp_path / "absent")).calibrated(call_of())


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_is_refused(tmp_path, version):
    header_of(tmp_path / "x", format=version)
    with pytest.raises(ValueError, match=f"has format {version!r}, this version reads 1"):
        load(tmp_path / "x")


WRONG = [..., None, "", 0.5, True, [{}], {"a": 1}]
ALLOWED = [("method", ""), ("versions", {"a": 1})]


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        (entry, value)
        for entry in ENTRIES
        for value in WRONG
        if entry != "format" and (entry, value) not in ALLOWED
    ],
)
def test_a_wrong_entry_is_named(tmp_path, entry, value):
    header_of(tmp_path / "x", **{entry: value})
    with pytest.raises(ValueError, match=f"no whole calibration file: {entry} missing or wrong"):
        load(tmp_path / "x")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("grid", [3, 4, 5]),
        ("grid", [0, 4, 5, 6]),
        ("grid", [3, 4, 5, -1]),
        ("grid", [3, 4, 5, 6.0]),
        ("origin", {"model": ""}),
        ("origin", {**ORIGIN.__dict__, "model": 1}),
        ("origin", {**ORIGIN.__dict__, "colour": ""}),
        ("fields", {"block": "64"}),
        ("steps", 0),
        ("layers", -1),
    ],
)
def test_a_wrong_value_is_named(tmp_path, entry, value):
    header_of(tmp_path / "x", **{entry: value})
    with pytest.raises(ValueError, match=f"{entry} missing or wrong"):
        load(tmp_path / "x")


def test_all_wrong_entries_are_named(tmp_path):
    header_of(tmp_path / "x", steps=..., grid=None, seeds="0")
    with pytest.raises(ValueError, match="grid, steps, seeds missing or wrong"):
        load(tmp_path / "x")


def test_every_difference_is_named(tmp_path):
    found = made(tmp_path / "x.safetensors")
    other = call_of(grid=Grid(3, 5, 4, 6), layers=3, origin=replace(ORIGIN, config="ffff"))
    with pytest.raises(ValueError) as caught:
        found.check("Elsewhere", other)
    for part in (
        "method of the file Planted, of this run Elsewhere",
        f"grid of the file {Grid(3, 4, 5)}, of this run {Grid(3, 5, 4)}",
        "layers of the file 2, of this run 3",
        "model configuration of the file a1b2, of this run ffff",
    ):
        assert part in str(caught.value)


def test_doubtful_differences_warn(tmp_path):
    found = made(tmp_path / "x.safetensors")
    origin = replace(ORIGIN, model="others/model", scheduler="UniPC")
    with pytest.warns(CalibrationWarning) as caught:
        found.check("Planted", call_of(origin=origin, steps=9))
    (warning,) = caught
    for part in (
        "model of the file makers/model, of this run others/model",
        "scheduler of the file Euler, of this run UniPC",
        "number of steps of the file 5, of this run 9",
    ):
        assert part in str(warning.message)


@pytest.mark.parametrize("text", [0, 6, 1000])
def test_text_of_another_length_is_no_difference(tmp_path, text):
    found = made(tmp_path / "x.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.check("Planted", call_of(grid=Grid(3, 4, 5, text)))


@pytest.mark.parametrize("file", [ORIGIN, Origin()], ids=["file knows", "file does not"])
@pytest.mark.parametrize("run", [ORIGIN, Origin()], ids=["run knows", "run does not"])
def test_what_is_unknown_is_no_difference(tmp_path, file, run):
    found = made(tmp_path / "x.safetensors", origin=file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.check("Planted", call_of(origin=run, steps=None))


def test_a_layer_reads_its_calibration_once_a_run(tmp_path, monkeypatch):
    made(tmp_path / "x.safetensors")
    call = call_of(steps=9)
    method = Planted(calibration=str(tmp_path / "x.safetensors"))
    with pytest.warns(CalibrationWarning):
        found = method.calibrated(call)
    monkeypatch.setattr(module, "load", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert method.calibrated(call) is found
        # Another layer: the file is not read again.
        assert method.calibrated(call_of(layer=1)) is found


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    path = tmp_path / "x.safetensors"
    made(path)
    method = Planted(calibration=str(path))
    with torch.inference_mode():
        before = method.calibrated(call_of())
    made(path, seeds=(7,))
    assert method.calibrated(call_of()).seeds == (7,) != before.seeds
    assert not any(tensor.is_inference() for tensor in before.tensors.values())


def test_another_block_is_refused(tmp_path):
    made(tmp_path / "x.safetensors")
    fields = {"calibration": str(tmp_path / "x.safetensors")}
    assert Planted(**fields, block=64).calibrated(call_of()).fields["block"] == 64
    with pytest.raises(ValueError, match="searched with block=64, but Planted has block=128"):
        Planted(**fields, block=128).calibrated(call_of())


def test_without_a_calibration_it_says_how_to_make_one():
    with pytest.raises(ValueError, match="Planted needs a calibration .*vdit-sparse calibrate"):
        Planted().calibrated(call_of())


def test_a_folder_is_searched_by_method_and_grid(tmp_path):
    made(tmp_path / "a.safetensors", method="Other")
    made(tmp_path / "b.safetensors")
    made(tmp_path / "c.safetensors", grid=Grid(1, 4, 5, 6))
    for method in (
        Planted(calibration=str(tmp_path)),
        Planted(),  # those that come with the checkpoint
    ):
        call = call_of(origin=replace(ORIGIN, calibrations=str(tmp_path)))
        assert Path(method.calibrated(call).path).name == "b.safetensors"
        call = replace(call, grid=Grid(1, 4, 5, 9), memory={})
        assert Path(method.calibrated(call).path).name == "c.safetensors"
    with pytest.raises(ValueError) as caught:
        Planted(calibration=str(tmp_path)).calibrated(call_of(grid=Grid(9, 9, 9)))
    assert "of Planted for the token grid [9, 9, 9]" in str(caught.value)
    assert "[1, 4, 5], [3, 4, 5]" in str(caught.value)


def test_of_several_in_a_folder_the_nearest_is_taken(tmp_path):
    for name, config, steps in (("a", "a1b2", 5), ("b", "a1b2", 9), ("c", "ffff", 5)):
        origin = replace(ORIGIN, config=config)
        made(tmp_path / f"{name}.safetensors", origin=origin, steps=steps)
    method = Planted(calibration=str(tmp_path))
    assert Path(method.calibrated(call_of(steps=5)).path).stem == "a"
    assert Path(method.calibrated(call_of(steps=9)).path).stem == "b"
    other = call_of(origin=replace(ORIGIN, config="ffff"))
    assert Path(method.calibrated(other).path).stem == "c"
    with pytest.raises(ValueError, match="2 calibrations .*: a.safetensors, b.safetensors. Pass"):
        method.calibrated(call_of(steps=7))


@pytest.mark.parametrize("steps", [1, 4, 5, 20, 50])
def test_a_step_is_matched_by_its_share_of_the_run(tmp_path, steps):
    found = made(tmp_path / "x.safetensors", steps=20)
    matched = [found.step_of(call_of(step=step, steps=steps)) for step in range(steps)]
    for step, match in enumerate(matched):
        share = step / max(steps - 1, 1)
        distances = [abs(share - other / 19) for other in range(20)]
        assert distances[match] == pytest.approx(min(distances))
    assert matched == sorted(matched) and matched[0] == 0
    assert steps == 1 or matched[-1] == 19


def test_the_same_number_of_steps_is_matched_one_to_one(tmp_path):
    found = made(tmp_path / "x.safetensors", steps=20)
    for steps in (20, None):
        matched = [found.step_of(call_of(step=step, steps=steps)) for step in range(20)]
        assert matched == list(range(20))
    assert found.step_of(call_of(step=30, steps=None)) == 19
    found = made(tmp_path / "x.safetensors", steps=1)
    assert {found.step_of(call_of(step=step, steps=7)) for step in range(7)} == {0}


@pytest.mark.parametrize("broken", ["save_file", "replace"])
def test_a_failed_save_leaves_the_former_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "x.safetensors"
    made(path)
    before = path.read_bytes()

    def breaks(tensors, half, *_):
        Path(half if broken == "save_file" else tensors).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(module if broken == "save_file" else module.os, broken, breaks)
    with pytest.raises(OSError, match="No space"):
        made(path, steps=9)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
