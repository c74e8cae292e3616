"""Suites from TOML, CSV and VBench's list, the bundled ones, and the file names of samples."""

import json

import pytest
from PIL import Image

from vdit_sparse.eval.adherence import draw_specs
from vdit_sparse.eval.adherence_checks import crosses
from vdit_sparse.eval.files import MOST_BYTES, new_file, sample_name, stems
from vdit_sparse.eval.suite import Prompt, Suite, SuiteError, names, read_suite

ENTRIES = [
    {"prompt_en": "a cat, running", "dimension": ["subject_consistency", "dynamic_degree"]},
    {"prompt_en": "A fantasy landscape", "dimension": ["overall_consistency"]},
    {"prompt_en": "the bund, oil painting", "dimension": ["appearance_style"]},
    {"prompt_en": "a fantasy landscape", "dimension": ["scene"]},
    {"prompt_en": "the bund, oil painting", "dimension": ["appearance_style"]},
]


def info(folder, entries=ENTRIES):
    file = folder / "VBench_full_info.json"
    file.write_text(json.dumps(entries))
    return file


def test_the_grammar_suite_is_the_one_that_adherence_draws():
    suite = read_suite("mini")
    specs = draw_specs(64)
    assert [prompt.text for prompt in suite.prompts] == [spec.caption for spec in specs]
    for prompt, spec in zip(suite.prompts, specs, strict=True):
        shown = prompt.shows
        assert (shown.place, shown.items, shown.time) == (spec.place, spec.items, spec.time)
        assert (shown.weather, shown.camera) == (spec.weather, spec.camera)
    assert any(crosses(prompt.shows) for prompt in suite.prompts)


def test_every_bundled_suite_that_needs_no_file_is_readable():
    assert {"mini", "images", "vbench165", "vbench251", "vbench946"} <= set(names())
    suite = read_suite("images")
    assert suite.media == "image" and len(suite.prompts) == 24
    with pytest.raises(SuiteError, match="--prompts VBench_full_info.json"):
        read_suite("vbench165")


def test_vbench_prompts_come_once_and_in_order(tmp_path):
    texts = [prompt.text for prompt in read_suite(str(info(tmp_path))).prompts]
    assert texts == [
        "a cat, running",
        "A fantasy landscape",
        "the bund, oil painting",
        "a fantasy landscape",
    ]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("vbench165", {"subject_consistency": 72, "overall_consistency": 93}),
        ("vbench251", {"subject_consistency": 72, "overall_consistency": 93, "scene": 86}),
        ("vbench_flickering", {"temporal_flickering": 75}),
    ],
)
def test_vbench_subsets_are_chosen_by_dimension_and_counted(tmp_path, name, counts):
    entries = [
        {"prompt_en": f"{dimension} {number}", "dimension": [dimension, "motion_smoothness"]}
        for dimension, count in {**counts, "color": 5}.items()
        for number in range(count)
    ]
    file = info(tmp_path, entries)
    assert len(read_suite(name, file).prompts) == sum(counts.values())
    info(tmp_path, entries[1:])
    with pytest.raises(SuiteError, match=rf"is {sum(counts.values())} entries of VBench, but .* "):
        read_suite(name, file)


def test_vbench_i2v_prompts_have_first_frames(tmp_path):
    cat = {"prompt_en": "a cat", "image_type": "animal", "image_name": "a cat.jpg"}
    sea = {"prompt_en": "the sea, camera static", "image_name": "the sea.jpg"}
    entries = [
        {**cat, "dimension": ["i2v_subject", "subject_consistency"]},
        {**cat, "dimension": ["i2v_subject"]},
        {**sea, "dimension": ["camera_motion"]},
    ]
    file = info(tmp_path, entries)
    with pytest.raises(SuiteError, match="have first frames: give --image DIR"):
        read_suite("vbench_i2v", file)
    with pytest.raises(
        SuiteError, match="1 of 1 first frames are not in .*, the first 'a cat.jpg'"
    ):
        read_suite("vbench_i2v", file, tmp_path)
    for name in ("a cat.jpg", "the sea.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    suite = read_suite("vbench_i2v", file, tmp_path)
    assert suite.prompts == (Prompt("a cat", image=tmp_path / "a cat.jpg"),)
    (_, other) = read_suite(str(file), images=tmp_path).prompts
    assert other == Prompt("the sea, camera static", image=tmp_path / "the sea.jpg")


def test_a_table_gives_prompts_negatives_and_images(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(
        'prompt,image,negative_prompt\n"a cat, running",first.png,blurred\na dog,,\n',
        encoding="utf-8-sig",
    )
    cat, dog = read_suite(str(file)).prompts
    assert cat == Prompt("a cat, running", "blurred", tmp_path / "first.png")
    assert dog == Prompt("a dog")


def test_the_digest_is_of_all_that_is_generated(tmp_path):
    def digest(*prompts, **fields):
        return Suite("x", prompts, **fields).digest

    image = tmp_path / "first.png"
    Image.new("RGB", (4, 4)).save(image)
    plain, pictured = Prompt("a cat"), Prompt("a cat", image=image)
    assert digest(plain) == digest(plain, about="other words")
    before = digest(pictured)
    Image.new("RGB", (4, 4), "red").save(image)
    found = [digest(plain), digest(plain, media="image"), digest(Prompt("a cat", "bad")), before]
    found += [digest(pictured), digest(Prompt("a dog"))]
    assert len(set(found)) == len(found)


BAD = {
    "nothing": ("mini2", None, "There is no suite 'mini2': name one of .*mini"),
    "missing": ("no.csv", None, "Cannot read .*no.csv .No such file"),
    "no TOML": ("a.toml", "prompts = [", "is no TOML"),
    "bytes": ("a.toml", b"prompts = ['\xff']", "is no UTF-8"),
    "a field": ("a.toml", "promts = []", "unknown promts; there are: about"),
    "media": ("a.toml", 'media = "sound"\nprompts = ["x"]', 'media must be "video" or "image"'),
    "no prompts": ("a.toml", "prompts = []", "has no prompts"),
    "neither": ("a.toml", "", "needs either `prompts` or a table"),
    "an entry": ("a.toml", "prompts = ['x', {txt = 'y'}]", "prompt 2: expected a text, or a table"),
    "an entry's field": ("a.toml", "prompts = [{text = 'x', see = 1}]", "prompt 1: unknown see"),
    "shows": (
        "a.toml",
        "prompts = [{text = 'x', shows = {place = 'moon', items = []}}]",
        "prompt 1: `shows` is not of the grammar .Unknown place 'moon'",
    ),
    "twice": ("a.toml", "prompts = ['x', 'x']", "a prompt twice: 'x'"),
    "blank": ("a.toml", "prompts = [' ']", "an empty prompt"),
    "no column": ("a.csv", "text\nx\n", "row 2: expected a column `prompt`"),
    "commas": ("a.csv", "prompt\na, b\n", "row 2: .*quoted where it holds commas"),
    "no JSON": ("a.json", "[", "is no VBench_full_info.json"),
    "other JSON": ("a.json", '[{"prompt": "x"}]', "is no VBench_full_info.json.*prompt_en"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_suite_that_cannot_be_used_is_one_line(case, tmp_path, monkeypatch):
    name, content, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SuiteError, match=said) as caught:
        read_suite(name)
    assert "\n" not in str(caught.value)


def test_names_are_vbench_names_where_they_can_be():
    texts = ["a cat, 'running'.", "日本の城", "x" * 210]
    assert stems(texts) == tuple(texts)
    assert sample_name("a cat.", 3, ".mp4") == "a cat.-3.mp4"


def test_other_names_are_safe_short_and_different(tmp_path):
    texts = ["A fantasy landscape", "a fantasy landscape", "a/b", "a_b", "../x", ".hidden"]
    texts += ["e\u0301clair", "\u00e9clair", "城" * 100, "城" * 100 + "!", "STRASSE", "straße"]
    found = stems(texts)
    assert found[0] == texts[0] and found[1].startswith("a fantasy landscape~")
    assert len({name.casefold() for name in found}) == len(texts)
    for name in found:
        assert len(name.encode()) <= MOST_BYTES and not name.startswith(".") and "/" not in name
        with new_file(tmp_path / sample_name(name, 2**63 - 1, ".mp4")) as temporary:
            temporary.write_text("x")
    assert len(list(tmp_path.iterdir())) == len(texts)
    with pytest.raises(ValueError, match="'a' comes twice"):
        stems(["a", "b", "a"])


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "x.mp4"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), new_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["x.mp4"] and path.read_text() == "old"
