"""The words of `vdit-sparse demo`."""

import socket

import pytest

from vdit_sparse.app.demo.command import parse_auth
from vdit_sparse.app.demo.server import is_loopback
from vdit_sparse.app.options import InputError


def test_a_password_in_a_file_is_not_seen_by_others(tmp_path):
    (tmp_path / "auth.txt").write_text("lab:a long: password\nmore\n")
    assert parse_auth(f"@{tmp_path / 'auth.txt'}") == ("lab", "a long: password")
    assert parse_auth("ann:x") == ("ann", "x") and parse_auth(None) is None


@pytest.mark.parametrize("text", ["ann", "ann:", ":x", "", "@/no/such/file"])
def test_half_a_password_is_none(text):
    with pytest.raises(InputError, match="--auth"):
        parse_auth(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "/no/such"], "--models /no/such is no folder"),
        (["--model", "./no-such"], "no model folder ./no-such"),
        (["--max-steps", "0"], "--max-steps must be at least 1"),
        (["--device", "cuda:9"], "cuda"),
    ],
)
def test_wrong_words_are_one_line(words, said, cli):
    result = cli("demo", *words)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_said(cli, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = cli("demo", "--port", port, "--device", "cpu", "--state", tmp_path)
    assert result.exit_code == 2 and "choose another --port" in result.stderr


def test_what_is_out_of_reach_of_others():
    assert all(map(is_loopback, ("127.0.0.1", "127.0.0.2", "localhost", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.4", "lab")))
