"""A calibration for another video, or none, is told before any model is loaded."""

from dataclasses import replace

import pytest
import torch

from tests.tiny_models.catalogue import TINY
from vdit_sparse.app.calibrations import PLAIN, Source, check_calibrations, stock_defaults
from vdit_sparse.app.checks import check_after_loading, source_of_folder
from vdit_sparse.app.demo.desk import Desk
from vdit_sparse.app.demo.limits import Studio
from vdit_sparse.app.options import InputError, RunChoice, parse_compare
from vdit_sparse.app.request import Request
from vdit_sparse.calibration import Calibration, save
from vdit_sparse.call import Origin
from vdit_sparse.grid import Grid
from vdit_sparse.methods import PAROAttention
from vdit_sparse.pipelines.checkpoints import checkpoint_like

MINI = "make one with `vdit-sparse calibrate --method {} --size 256x448 --num-frames 49 ...`"
MADE = "is for 25 frames of 256x448, but 49 frames of 256x448 were asked for"


@pytest.fixture
def file(tmp_path):
    """Makes a calibration file that no method could run with."""

    def make(grid: Grid, method: str = "PAROAttention", folder: str = "") -> str:
        path = tmp_path / folder / f"{method}.safetensors"
        facts = {"origin": Origin(), "grid": grid, "layers": 1, "steps": 2, "versions": {}}
        made = {"prompts": ("a cat",), "seeds": (0,), "tensors": {"x.y": torch.zeros(1)}}
        save(Calibration(str(path), method, {"block": 64}, **facts, **made))
        return str(path)

    return make


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    """Whatever is refused here is refused before."""

    def load(*_, **__):
        raise RuntimeError("the model was loaded")

    monkeypatch.setattr("vdit_sparse.pipelines.load.load_pipeline", load)


def asked(method: str, tmp_path, **words) -> Request:
    return Request(prompt="a cat", runs=(parse_compare(method),), out=tmp_path, **words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate", ("--prompt", "a cat", "--method", "dense", "--compare")),
        ("inspect", ("--prompt", "a cat", "--preset")),
        ("eval run", ("--suite", "mini", "--method")),
    ],
)
@pytest.mark.parametrize("method", ["paro", "sparse-vdit"])
def test_every_command_refuses_another_length(command, words, method, cli, tmp_path):
    video = ("--num-frames", 49, "--device", "cpu", "--out", tmp_path / "out")
    result = cli(*command.split(), *words, f"{method}-mini", *video)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2 and MADE in said and MINI.format(method) in said, result.output


def test_the_studio_refuses_it_too(tmp_path):
    desk, form = Desk(Studio(tmp_path)), {"prompt": "a cat", "num_frames": 49}
    for kind, runs in (("generate", ["paro-mini"]), ("inspect", ["sparse-vdit-mini"])):
        with pytest.raises(InputError, match=MADE):
            desk.submit("0" * 32, kind, {**form, "runs": runs})
    with pytest.raises(InputError, match=MADE):
        desk.submit("0" * 32, "compare", {**form, "runs": ["dense", "paro-mini"]})


def test_the_bundled_models_own_size_passes(tmp_path):
    for model in (None, "mini-fast"):
        source = source_of_folder(model)
        for name in ("paro-mini", "sparse-vdit-mini", "radial-mini"):
            check_calibrations(asked(name, tmp_path, model=model), source)
        with pytest.raises(InputError, match="but 25 frames of 128x448 were asked for"):
            check_calibrations(asked("paro-mini", tmp_path, size=(128, 448)), source)


def test_a_file_of_tune_is_judged_too(file, tmp_path):
    path = file(Grid(7, 16, 28), "TunedAttention")
    request = asked(f"tuned:calibration={path}", tmp_path, num_frames=33)
    with pytest.raises(InputError, match=r"33 frames .* `vdit-sparse tune --density 0\.3 --size"):
        check_calibrations(request, source_of_folder(None))
    fits = asked(f"tuned:calibration={path}", tmp_path)
    check_calibrations(fits, source_of_folder(None))
    # The text of older files says nothing of the video.
    old = file(Grid(7, 16, 28, 12), "TunedAttention", "old")
    check_calibrations(asked(f"tuned:calibration={old}", tmp_path), source_of_folder(None))


def test_of_a_folder_any_file_of_the_method_will_do(file, tmp_path):
    folder = tmp_path / "all"
    file(Grid(7, 16, 28), "PAROAttention", "all/.")
    file(Grid(9, 16, 28), "SparseVDiTAttention", "all/.")
    request = asked(f"paro:calibration={folder}", tmp_path)
    check_calibrations(request, source_of_folder(None))
    with pytest.raises(InputError, match="Method tuned needs a calibration .* and all has none"):
        check_calibrations(asked(f"tuned:calibration={folder}", tmp_path), source_of_folder(None))
    with pytest.raises(InputError, match=r"\(all\) is for 25 frames of 256x448"):
        check_calibrations(
            asked(f"paro:calibration={folder}", tmp_path, num_frames=33), source_of_folder(None)
        )


def test_published_models_are_judged_by_the_defaults_of_their_call(file, tmp_path):
    """Wan's pipeline makes 81 frames of 480x832 where nothing is said."""
    path = file(Grid(21, 30, 52))
    for model in ("wan2.1-t2v-14b", "Wan-AI/Wan2.1-T2V-14B-Diffusers"):
        request = asked(f"paro:calibration={path}", tmp_path, model=model)
        check_calibrations(request, source_of_folder(model))
        wide = asked(f"paro:calibration={path}", tmp_path, model=model, size=(720, 1280))
        with pytest.raises(InputError, match="is for 81 frames of 480x832, but 81 frames of 720"):
            check_calibrations(wide, source_of_folder(model))
    # Whether a repository comes with calibrations is not known here.
    check_calibrations(asked("paro", tmp_path, model=model), source_of_folder(model))


def test_what_is_not_known_passes_until_the_model_is_loaded(file, tmp_path):
    pipe = TINY["wan"]().pipe
    request = asked(f"paro:calibration={file(Grid(3, 8, 8))}", tmp_path, model="some/model")
    check_calibrations(request, source_of_folder("some/model"))
    with pytest.raises(InputError, match="is for 9 frames of 128x128, but 81 frames of 480x832"):
        check_after_loading(pipe, request)
    with pytest.raises(InputError, match="needs a calibration .* the checkpoint has none"):
        check_after_loading(pipe, asked("paro", tmp_path, model="some/model"))
    check_after_loading(pipe, replace(request, size=(128, 128), num_frames=9))


def test_a_file_may_fit_several_lengths(file, tmp_path):
    """CogVideoX 1.5 pads latent frames to pairs: 81 and 85 frames are as many tokens."""
    published = source_of_folder("cogvideox1.5-5b")
    path = file(Grid(11, 48, 85))
    for frames in (81, 85):
        video = {"size": (768, 1360), "num_frames": frames}
        check_calibrations(asked(f"paro:calibration={path}", tmp_path, **video), published)
    video["num_frames"] = 77
    with pytest.raises(InputError, match="is for 85 frames of 768x1360, but 77 frames"):
        check_calibrations(asked(f"paro:calibration={path}", tmp_path, **video), published)


@pytest.mark.parametrize("name", ["allegro", "cogvideox-1.5", "hunyuan-video", "mochi", "wan"])
def test_the_grid_is_that_of_the_run(name):
    """What files are compared with is what the transformer is given."""
    from vdit_sparse.pipelines.families import family_of

    tiny, seen = TINY[name](), []
    pipe, model = tiny.pipe, tiny.pipe.transformer
    assert type(pipe).__name__ in PLAIN and stock_defaults(type(pipe).__name__)["height"] != 0

    def look(module, _, given):
        seen.append(family_of(module).grid(module, given))
        raise InterruptedError

    with model.register_forward_pre_hook(look, with_kwargs=True), pytest.raises(InterruptedError):
        pipe(**tiny.call)
    like = checkpoint_like(type(model).__name__, model.config, pipe.vae.config)
    runs = (RunChoice("paro", PAROAttention()),)
    size = (tiny.call["height"], tiny.call["width"])
    request = Request(
        prompt="x", runs=runs, out=None, size=size, num_frames=tiny.call["num_frames"]
    )
    grid = like.grid(*Source(like, type(pipe).__name__).video(request))
    assert (grid.frames, grid.height, grid.width) == (
        seen[0].frames,
        seen[0].height,
        seen[0].width,
    )
