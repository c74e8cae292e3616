import json

import pytest
import torch

from tests.pipelines.mini.toys import randomise
from vdit_sparse.app import checks
from vdit_sparse.pipelines import load
from vdit_sparse.pipelines.mini.training import train
from vdit_sparse.pipelines.mini.training.checkpoints import Checkpoints
from vdit_sparse.pipelines.mini.training.denoiser import Denoiser
from vdit_sparse.pipelines.mini.training.models import TINY, build_autoencoder

SIZE = ["--height", "32", "--width", "64", "--frames", "5"]
CALL = {"height": 32, "width": 64, "num_frames": 5, "output_type": "latent"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are tiny: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread):
    """Checkpoints and export of a random model, distilled by the command line."""
    torch.manual_seed(0)
    checkpoints = Checkpoints(tmp_path_factory.mktemp("distilled"))
    vae, model = build_autoencoder(TINY), randomise(Denoiser(TINY), 0.05)
    checkpoints.save(
        "autoencoder",
        {"average": vae.state_dict(), "mean": torch.zeros(8), "std": torch.ones(8)},
    )
    checkpoints.save(
        "denoiser",
        {
            "transformer_average": model.transformer.state_dict(),
            "text_encoder_average": model.text_encoder.state_dict(),
        },
    )
    common = ["--folder", str(checkpoints.folder), "--sizes", "tiny"]
    stage = ["distill", *common, *SIZE, "--device", "cpu", "--batch", "2", "--clips", "2"]
    stage += ["--seconds", "0.5", "--no-compiled"]
    train.main(["export", *common, "then", *stage, "then", *stage, "--resume"])
    generation = {**CALL, "num_inference_steps": 9, "guidance_scale": 4.0, "fps": 10}
    generation |= {"output_type": "np", "max_sequence_length": 64}
    (checkpoints.pipeline / "generation.json").write_text(json.dumps(generation))
    return checkpoints


@pytest.fixture
def bundled(trained, monkeypatch):
    """The distilled model in the place of the bundled one."""
    monkeypatch.setattr(load, "MINI", trained.pipeline)
    monkeypatch.setattr(checks, "bundled_model", lambda: trained.pipeline)
    return trained.pipeline
