"""Words on the command line and what they become."""

from dataclasses import dataclass

import pytest

from vdit_sparse.app.options import (
    InputError,
    RunChoice,
    parse_compare,
    parse_field,
    parse_lora,
    parse_run,
    parse_size,
    show_value,
)
from vdit_sparse.methods import RadialAttention


@dataclass(frozen=True)
class Fields:
    """One field of each kind of annotation."""

    flag: bool = False
    count: int = 0
    share: float = 0.0
    word: str = ""
    steps: tuple[int, ...] = ()
    maybe: float | None = None
    refresh: str | int | tuple[int, ...] = "each"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("flag", "true", True),
        ("flag", "No", False),
        ("flag", "1", True),
        ("count", "-3", -3),
        ("share", "0.25", 0.25),
        ("share", "1", 1.0),
        ("share", "1e-3", 0.001),
        ("word", "7", "7"),
        ("steps", "0,4,8", (0, 4, 8)),
        ("steps", "3", (3,)),
        ("maybe", "none", None),
        ("maybe", "2", 2.0),
        ("refresh", "once", "once"),
        ("refresh", "4", 4),
        ("refresh", "0,4,8", (0, 4, 8)),
        ("refresh", "4,", (4,)),
    ],
)
def test_a_field_is_read_by_its_annotation(name, text, value):
    read = parse_field(Fields, name, text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("flag", "maybe", "true or false"),
        ("count", "1.5", "an integer"),
        ("share", "much", "a number"),
        ("steps", "0,x", "a list of numbers"),
        ("maybe", "some", "a number or none"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(name, text, expected):
    with pytest.raises(InputError, match=f"{name} must be {expected}.*{text!r}"):
        parse_field(Fields, name, text)


@pytest.mark.parametrize("value", [True, None, 3, 0.5, "once", (4,), (0, 4, 8)])
def test_a_shown_value_reads_back(value):
    kinds = {bool: "flag", type(None): "maybe", float: "share"}
    name = kinds.get(type(value), "refresh")
    assert parse_field(Fields, name, show_value(value)) == value


def test_settings_become_a_method():
    choice = parse_run("radial", ["decay=0.5", "dense_steps=2", "refresh=0,4", "backend=gather"])
    expected = RadialAttention(decay=0.5, dense_steps=2, refresh=(0, 4), backend="gather")
    assert choice == RunChoice("radial", expected)
    assert choice.label == "radial dense_steps=2 refresh=0,4 backend=gather decay=0.5"


def test_dense_has_no_method():
    assert parse_run("dense") == RunChoice("dense")


def test_a_preset_can_be_changed():
    plain = parse_run(None, [], "radial-wan2.1")
    changed = parse_run("radial", ["dense_steps=3"], "radial-wan2.1")
    assert plain.preset == plain.label == "radial-wan2.1"
    assert changed.preset is None and changed.method.dense_steps == 3
    assert changed.method.dense_layers == plain.method.dense_layers == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("radal",), "no method 'radal' .did you mean 'radial'.*dense, radial"),
        (("radial", ["dekay=1"]), "no field 'dekay' .did you mean 'decay'.*dense_steps"),
        (("radial", ["decay"]), "field=value, got 'decay'"),
        (("radial", ["decay=-1"]), "decay must be .*above 0"),
        (("radial", ["block=96"]), "block must be one of"),
        (("radial", ["backend=trition"]), "one of .*triton.*got 'trition'"),
        (("dense", ["decay=1"]), "dense has no fields"),
        ((None, [], "radial-wan2.3"), "no preset 'radial-wan2.3' .did you mean 'radial-wan2"),
        (("dense", [], "radial-wan2.1"), "is of --method radial"),
    ],
)
def test_a_wrong_run_says_what_there_is(arguments, message):
    with pytest.raises(InputError, match=message):
        parse_run(*arguments)


def test_compare_takes_methods_with_fields_and_presets():
    assert parse_compare("dense") == RunChoice("dense")
    listed = parse_compare("radial:refresh=0,4,decay=0.5")
    assert listed.method == RadialAttention(refresh=(0, 4), decay=0.5)
    assert parse_compare("radial-wan2.1").preset == "radial-wan2.1"
    with pytest.raises(InputError, match="'radical' .did you mean 'radial'"):
        parse_compare("radical")


def test_sizes_are_height_first():
    assert parse_size("256x448") == (256, 448)
    with pytest.raises(InputError, match="HEIGHTxWIDTH"):
        parse_size("256")


def test_loras_have_weights(tmp_path):
    file = tmp_path / "some.safetensors"
    file.touch()
    assert parse_lora("who/what") == ("who/what", 1.0)
    assert parse_lora("who/what:0.5") == ("who/what", 0.5)
    assert parse_lora(f"{file}:-1") == (str(file), -1.0)
    for wrong in (":0.5", "who/what:nan", str(tmp_path / "other.safetensors")):
        with pytest.raises(InputError, match="LoRA|--lora"):
            parse_lora(wrong)


def test_a_label_names_a_calibration_without_its_folders():
    choice = parse_compare("paro:calibration=/srv/users/ann/paro.safetensors,dense_steps=2")
    assert choice.label == "paro dense_steps=2 calibration=paro.safetensors"
    assert choice.method.calibration == "/srv/users/ann/paro.safetensors"
    assert parse_compare("paro").label == "paro"
