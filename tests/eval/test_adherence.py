"""Adherence: renders score one with a judge that knows, and the checks see what is drawn."""

import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vdit_sparse.eval import adherence as evaluation
from vdit_sparse.eval.adherence import adherence, compared, draw_specs, table
from vdit_sparse.eval.adherence_checks import check, colour, crosses, direction
from vdit_sparse.eval.judge import load_judge
from vdit_sparse.eval.metrics import adherence as metric
from vdit_sparse.pipelines.mini.training.captions import Item, Spec, sample_spec
from vdit_sparse.pipelines.mini.training.clips import to_bytes
from vdit_sparse.pipelines.mini.training.judge import JUDGES, JudgeNetwork, save_judge
from vdit_sparse.pipelines.mini.training.judge_labels import DIRECTIONS, ROWS, Score, labels
from vdit_sparse.pipelines.mini.training.video import ProceduralVideo
from vdit_sparse.pipelines.mini.training.vocabulary import COLOURS

HEIGHT, WIDTH, FRAMES = 48, 84, 9


@pytest.fixture(scope="module")
def generator():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ProceduralVideo("cpu", HEIGHT, WIDTH, FRAMES)
    torch.set_num_threads(threads)


class Oracle:
    """Answers from the specs, in the order of the videos."""

    def __init__(self, specs):
        self.specs = iter(specs)

    def answers(self, video):
        return labels(next(self.specs))


def render(generator, specs) -> list[torch.Tensor]:
    return list(to_bytes(generator.render(specs)).transpose(1, 2))


def test_renders_adhere_to_their_own_specs(generator):
    specs = draw_specs(6)
    found = adherence(Oracle(specs), render(generator, specs), specs)
    asked = [row for row in ROWS if found[row].asked]
    assert {"place", "camera", "object", "count", "motion"} <= set(asked)
    assert all(found[row].accuracy == 1 for row in asked)
    assert draw_specs(6) == specs


def test_the_number_of_videos_has_to_match(generator):
    specs = draw_specs(2)
    with pytest.raises(ValueError):
        adherence(Oracle(specs), render(generator, specs[:1]), specs)


@pytest.mark.parametrize("motion", DIRECTIONS)
def test_the_centroid_shows_the_direction(generator, motion):
    rng = np.random.default_rng(11)
    specs = []
    while len(specs) < 10:
        drawn = sample_spec(rng)
        item = Item(drawn.items[0].name, drawn.items[0].colour, drawn.items[0].count, motion)
        specs.append(Spec(drawn.place, (item,), drawn.time, drawn.weather, seed=drawn.seed))
    right = sum(direction(video) == motion for video in render(generator, specs))
    assert right >= 9


@pytest.mark.parametrize("name", ["ball", "fish"])
def test_the_hue_shows_the_colour(generator, name):
    places = ("meadow", "city", "underwater", "studio", "desert", "forest", "room")
    specs = [
        Spec(place, (Item(name, hue, motion="right"),), "day" * (i in (0, 1, 4, 5)), seed=i)
        for i, (place, hue) in enumerate(zip(places, COLOURS, strict=True))
    ]
    found = [colour(video) for video in render(generator, specs)]
    assert sum(a == b for a, b in zip(found, COLOURS, strict=True)) >= 6


def test_nothing_is_seen_in_a_picture_that_stands_still():
    still = torch.rand(1, 3, 32, 56).expand(9, -1, -1, -1)
    assert direction(still) == "none"
    assert colour(still) == "none"


def test_a_square_that_is_moved_by_hand():
    video = torch.full((9, 3, 32, 56), 0.5)
    for frame in range(9):
        video[frame, 0, 4 + 2 * frame : 10 + 2 * frame, 20:26] = 1.0
        video[frame, 1:, 4 + 2 * frame : 10 + 2 * frame, 20:26] = 0.0
    assert direction(video) == "down"
    assert direction(video.flip(0)) == "up"
    assert direction(video.transpose(2, 3)) == "right"
    assert colour(video) == "red"


def test_checks_apply_to_one_thing_that_crosses():
    one = Item("ball", "red", motion="left")
    assert crosses(Spec("studio", (one,)))
    assert not crosses(Spec("studio", (one, Item("dog"))))
    assert not crosses(Spec("studio", (Item("ball", "red", motion="spin"),)))
    video = torch.zeros(5, 3, 16, 28)
    uncoloured = check(video, Spec("studio", (Item("dog", motion="left"),)))
    assert uncoloured == {"direction by centroid": Score(0, 1), "colour by hue": Score()}


def test_the_report_divides_by_the_accuracy_on_renders():
    found = {"place": Score(9, 10), "colour": Score(4, 10), "time": Score(), "motion": Score(1, 2)}
    rows = compared(found, {"place": 0.9, "colour": 0.8, "motion": None})
    assert [row["row"] for row in rows] == ["place", "colour", "motion"]
    assert [row["adherence"] for row in rows] == [1.0, 0.5, None]
    lines = table(rows).splitlines()
    assert "| place | 10 | 0.900 | 0.900 | 1.000 | 0.95 met |" in lines
    assert "| colour | 10 | 0.400 | 0.800 | 0.500 | 0.85 not met |" in lines
    assert "| motion | 2 | 0.500 |  |  |  |" in lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("judge")
    held_out = {"clips": 4, "renders": {"place": 0.5}, "static": {"place": 0.25}}
    torch.manual_seed(0)
    save_judge(JudgeNetwork(JUDGES["tiny"]), place, {"held_out": held_out})
    return place


def test_a_judge_gives_distributions_for_any_size(folder, device):
    judge = load_judge(folder, device=device)
    video = torch.randint(0, 256, (5, 3, 40, 60), dtype=torch.uint8)
    found = judge(video)
    assert {head: each.shape for head, each in found.items()} == {
        head: (len(names),) for head, names in judge.classes.items()
    }
    assert all(abs(each.sum() - 1) < 1e-5 for each in found.values())
    for head, answer in judge.answers(video).items():
        assert found[head][judge.classes[head].index(answer)] == found[head].max()
    torch.testing.assert_close(judge(video.double() / 255), found)
    assert judge.accuracy("place") == 0.5
    assert judge.accuracy("place", "static") == 0.25
    assert judge.accuracy("colour") is judge.accuracy("place", "moving") is None


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(5, 4, 8, 8), r"\[T, 3, H, W\], not empty, got \(5, 4, 8, 8\)"),
        (torch.full((5, 3, 8, 8), 2.0), r"float frames in \[0, 1\]"),
        (torch.zeros(5, 3, 8, 8, dtype=torch.int64), "got torch.int64"),
    ],
)
def test_what_is_no_video_is_refused(folder, video, message):
    judge = load_judge(folder, device="cpu")
    with pytest.raises(ValueError, match=message):
        judge(video)
    with pytest.raises(ValueError, match=message):
        direction(video)


def test_the_scores_are_plain_numbers():
    rows = compared({"place": Score(1, 2)}, {"place": 1.0})
    assert json.loads(json.dumps(rows)) == rows


def test_the_command_generates_counts_and_writes(folder, tmp_path, monkeypatch):
    class Pipe:
        device = torch.device("cpu")

        def set_progress_bar_config(self, **_):
            pass

    sizes = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "fps": 10}
    calls = []

    def rendered(pipe, inputs, on_step):
        calls.append(inputs)
        specs = {spec.caption: spec for spec in draw_specs(3)}
        clips = ProceduralVideo("cpu", HEIGHT, WIDTH, FRAMES).render(
            [specs[prompt] for prompt in inputs["prompt"]]
        )
        return to_bytes(clips).transpose(1, 2), None

    monkeypatch.setattr(evaluation, "load_pipeline", lambda model: Pipe())
    monkeypatch.setattr(evaluation, "defaults", lambda pipe: sizes)
    monkeypatch.setattr(evaluation, "timed_call", rendered)
    words = ["--prompts", "3", "--seeds", "2", "--batch", "4", "--renders", "8", "--steps", "5"]
    words += ["--show", "2", "--out", str(tmp_path / "out"), "--judge", str(folder)]
    evaluation.main(words)
    assert [inputs["seed"] for inputs in calls] == [[0, 1, 2, 3], [4, 5]]
    assert calls[0]["num_inference_steps"] == 5 and "fps" not in calls[0]
    result = json.loads((tmp_path / "out" / "adherence.json").read_text())
    (place,) = (row for row in result["rows"] if row["row"] == "place")
    assert place["asked"] == 6 and place["on renders"] == 0.5
    assert result["renders"]["judge"] == 4
    text = (tmp_path / "out" / "adherence.md").read_text()
    assert text.startswith("**all clips**\n\n| row | asked | accuracy | on renders |")
    assert result["clips"] == 6 and result["command"].endswith(shlex.join(words))
    moving = [spec.camera != "static" for spec in draw_specs(3)]
    for group, count in (("moving camera", sum(moving)), ("static camera", 3 - sum(moving))):
        asked = [row["asked"] for row in result[group] if row["row"] == "place"]
        assert asked == [2 * count] * bool(count)
    shown = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert shown == ["adherence.json", "adherence.md", "clip-00.webp", "clip-01.webp", "sheet.jpg"]
    assert Image.open(tmp_path / "out" / "clip-01.webp").n_frames == FRAMES


def test_a_run_that_is_killed_leaves_what_it_counted(folder, tmp_path, monkeypatch):
    frames = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)

    def generated(*_):
        yield frames[None], draw_specs(1)
        raise KeyboardInterrupt

    pipe = SimpleNamespace(device="cpu", set_progress_bar_config=lambda **_: None)
    sizes = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    monkeypatch.setattr(evaluation, "load_pipeline", lambda model: pipe)
    monkeypatch.setattr(evaluation, "defaults", lambda pipe: sizes)
    monkeypatch.setattr(evaluation, "generated", generated)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(["--renders", "0", "--out", str(tmp_path), "--judge", str(folder)])
    result = json.loads((tmp_path / "adherence.json").read_text())
    assert result["clips"] == 1 and {row["row"] for row in result["rows"]} >= {"place", "object"}
    assert "| place | 1 |" in (tmp_path / "adherence.md").read_text()


def test_the_metrics_title_says_how_often_the_judge_itself_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr(metric, "SHIPPED", tmp_path)
    assert metric.title() == "adherence (judge)"
    save_judge(JudgeNetwork(JUDGES["tiny"]), tmp_path, {})
    assert metric.title() == "adherence (judge; on renders not measured)"
    facts = {"held_out": {"renders": {"statements": 0.91}}}
    save_judge(JudgeNetwork(JUDGES["tiny"]), tmp_path, facts)
    assert metric.title() == "adherence (judge; on renders 0.910)"
