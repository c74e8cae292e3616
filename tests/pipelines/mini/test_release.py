"""A release takes what came back, refuses what does not fit, and fills the card from reports."""

import json
import shutil
import stat
import tarfile

import pytest
import torch

from tests.pipelines.mini.toys import randomise
from vdit_sparse.pipelines.few_step import FOLDER, save_few_step
from vdit_sparse.pipelines.mini.training import release as releasing
from vdit_sparse.pipelines.mini.training.card import NOT_MEASURED, fill, section, size_table
from vdit_sparse.pipelines.mini.training.checkpoints import Checkpoints, assemble, export
from vdit_sparse.pipelines.mini.training.denoiser import Denoiser
from vdit_sparse.pipelines.mini.training.judge import JUDGES, JudgeNetwork, save_judge
from vdit_sparse.pipelines.mini.training.models import TINY, build_autoencoder
from vdit_sparse.pipelines.mini.training.release import archives, release
from vdit_sparse.pipelines.mini.training.reports import write_report
from vdit_sparse.pipelines.mini.training.trajectories import build_few_step_scheduler

CARD = """# A card
<!-- size -->
<!-- end size -->
## Adherence
<!-- adherence-25-frames -->
old figures
<!-- end adherence-25-frames -->
<!-- structure-25-frames -->
old structure
<!-- end structure-25-frames -->
By hand.
"""


def made(folder, seed):
    """A tiny exported model."""
    torch.manual_seed(seed)
    checkpoints, vae = Checkpoints(folder), randomise(build_autoencoder(TINY), 0.05)
    model = randomise(Denoiser(TINY), 0.05)
    state = {"average": vae.state_dict(), "mean": torch.zeros(8), "std": torch.ones(8)}
    checkpoints.save("autoencoder", state)
    state = {"transformer_average": model.transformer.state_dict()}
    checkpoints.save("denoiser", {**state, "text_encoder_average": model.text_encoder.state_dict()})
    export(assemble(checkpoints, TINY), folder / "mini")
    return folder / "mini", model.transformer


def few_step(folder, transformer):
    factors = {"proj_out": (torch.ones(32, 2), torch.ones(2, 64))}
    scheduler = build_few_step_scheduler(4, 3.0)
    call = {"num_inference_steps": 4, "guidance_scale": 1.0}
    save_few_step(folder, factors, transformer.proj_out.bias, scheduler, call)


@pytest.fixture(scope="module")
def models(tmp_path_factory, one_thread):
    """The old model with its few-step weights, and a new one."""
    old, transformer = made(tmp_path_factory.mktemp("old"), 1)
    few_step(old, transformer)
    (old / "README.md").write_text(CARD)
    new, transformer = made(tmp_path_factory.mktemp("new"), 2)
    few_step(new, transformer)
    save_judge(JudgeNetwork(JUDGES["tiny"]), new / "judge", {})
    return old, new


@pytest.fixture
def model(models, tmp_path):
    return shutil.copytree(models[0], tmp_path / "model")


def returned(models, folder, parts=releasing.PARTS, reports=()):
    """A folder as a run leaves it: one archive in pieces, another whole."""
    folder.mkdir()
    with tarfile.open(folder / "all.tar", "w") as archive:
        for part in parts:
            if (models[1] / part).is_dir():
                archive.add(models[1] / part, f"mini/{part}")
    content = (folder / "all.tar").read_bytes()
    (folder / "all.tar").unlink()
    half = len(content) // 2
    for name, piece in (("t4.aa", content[:half]), ("t4.ab", content[half:])):
        (folder / name).write_bytes(piece)
    for name, text in reports:
        path = folder / "reports" / name
        if name.endswith("run.json"):
            path.write_text(json.dumps({"commit": text}))
        else:
            write_report(path, text, {}, "cpu", "python -m x")
            without_git = json.loads(path.read_text()) | {"commit": "unknown"}
            path.write_text(json.dumps(without_git))
    if reports:
        with tarfile.open(folder / "reports.tar", "w") as archive:
            archive.add(folder / "reports", "reports")
        shutil.rmtree(folder / "reports")
    (folder / "t4.sh").touch()
    return folder


def test_parts_are_replaced_and_the_card_is_filled(models, model, tmp_path):
    reports = [("adherence-25-frames/adherence.json", "| new figures |"), ("run.json", "abc1234")]
    folder = returned(models, tmp_path / "t4", reports=reports)
    size = release([folder], model)
    for part in ("transformer", "vae", "text_encoder", FOLDER, "judge"):
        for file in (models[1] / part).iterdir():
            assert (model / part / file.name).read_bytes() == file.read_bytes()
            assert (model / part / file.name).stat().st_mode & stat.S_IROTH
    assert size == sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    card = (model / "README.md").read_text()
    assert "| new figures |\n\ncpu, " in card and "commit `abc1234`: `python -m x`" in card
    assert "old" not in card and card.count(NOT_MEASURED) == 1
    assert f"| all | {size / 1e6:.2f} |" in card and card.endswith("By hand.\n")
    # What is measured later is filled in later; the rest stays.
    later = returned(models, tmp_path / "t5", [FOLDER], [("structure-25-frames.json", "| s |")])
    release([later], model)
    card = (model / "README.md").read_text()
    assert "| new figures |" in card and "| s |" in card and NOT_MEASURED not in card
    here = tmp_path / "here" / "reports"
    write_report(here / "structure-25-frames.json", "| measured here |", {}, "cpu", "python -m y")
    release([here.parent], model)
    assert "| measured here |" in (model / "README.md").read_text()


def test_a_later_folder_counts_and_its_parts_must_be_of_the_same_transformer(
    models, model, tmp_path
):
    first = returned(models, tmp_path / "t4", ["transformer", FOLDER])
    second = tmp_path / "t5"
    shutil.copytree(models[0] / FOLDER, second / "mini" / FOLDER)
    before = size_table(model)
    with pytest.raises(ValueError, match="LoRA was made for other weights"):
        release([first, second], model)
    assert size_table(model) == before
    release([second, first], model)


def test_old_parts_of_a_new_transformer_are_refused(models, model, tmp_path):
    folder = returned(models, tmp_path / "t4", ["transformer"])
    with pytest.raises(ValueError, match="transformer_fast in .* would stay those of the old one"):
        release([folder], model)
    releasing.main([str(folder), "--model", str(model), "--keep-old"])
    assert not (model / FOLDER).exists()


def test_what_does_not_fit_or_is_cut_off_is_refused(models, model, tmp_path):
    folder = returned(models, tmp_path / "t4")
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="(?s)at most 1,000 bytes.*rank of the LoRA"):
        release([folder], model, limit=1000)
    (folder / "t4.ab").rename(folder / "t4.ac")
    with pytest.raises(ValueError, match=r"Expected t4\.ab in .*, got t4\.ac next"):
        archives(folder)
    (folder / "t4.ac").unlink()
    with pytest.raises(ValueError, match=r"t4 in .* is cut off .*got t4\.aa"):
        release([folder], model)
    (folder / "t4.aa").unlink()
    with pytest.raises(ValueError, match="Expected one of transformer, vae"):
        release([folder], model)
    assert before == {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}


def test_weights_that_are_not_finite_are_refused(models, model, tmp_path):
    folder = tmp_path / "t4"
    pipeline = releasing.WanPipeline.from_pretrained(models[1], local_files_only=True)
    with torch.no_grad():
        pipeline.vae.quant_conv.bias[0] = torch.nan
    pipeline.vae.save_pretrained(folder / "mini" / "vae")
    with pytest.raises(ValueError, match="weights of vae are not finite"):
        release([folder], model)


def test_a_report_without_a_place_is_refused():
    with pytest.raises(ValueError, match="none for speed: write `<!-- speed -->`"):
        fill(CARD, {"speed": {"markdown": "1 s"}}, ())
    assert fill(CARD, {}, ()) == CARD
    assert section({"markdown": "1 s"}) == "1 s\n"


def test_the_card_has_the_places_of_all_reports():
    card = (releasing.BUNDLED / "README.md").read_text()
    names = ("size", "autoencoder", "adherence-25-frames", "adherence-49-frames")
    names += ("adherence-mini-fast", "time-mini-fast", "structure-25-frames", "structure-49-frames")
    reports = {name: {"markdown": f"figures of {name}"} for name in names}
    filled = fill(card, reports, ["transformer"])
    assert all(f"figures of {name}\n" in filled for name in names)
    assert fill(filled, reports, ["transformer"]) == filled
    other = fill(filled, {}, ["transformer"])
    assert "figures of autoencoder\n" in other and "adherence-25-frames\n" not in other
    assert "figures of autoencoder\n" not in fill(filled, {}, ["vae"])
