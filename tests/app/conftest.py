"""A tiny random model in a folder, as a user would have it."""

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny_models import flux, tiny_wan, tiny_wan_i2v
from vdit_sparse.app.cli import app


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Threads that wait for each other make tiny models many times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a text-to-video model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_wan().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_image_model(tmp_path_factory):
    """Folder of an image-to-video model."""
    folder = tmp_path_factory.mktemp("models") / "tiny-i2v"
    tiny_wan_i2v().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """Folder of a text-to-image model."""
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    flux.text_to_image().pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def cli():
    """Runs the command line in this process."""

    def run(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    return run
