"""DESIGN.md's laws of imports and layers, read off the syntax trees."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "vdit_sparse", "pipelines", "eval", "app")
# Each room may import itself and the rooms before it.
BELOW = {room: set(ROOMS[: i + 1]) for i, room in enumerate(ROOMS)}
FILES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
LIBRARIES = {
    "diffusers": ("pipelines/",),
    "transformers": ("pipelines/",),
    "gradio": ("app/demo/",),
    "triton": ("kernels/",),
}
PRINTS = (
    "app/",
    "kernels/bench",
    "eval/compare.py",
    "eval/decay.py",
    "eval/speed.py",
    "pipelines/mini/training/",
)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), name_of(file))


def imports_of(tree: ast.Module, top_level: bool = False) -> list[str]:
    nodes = tree.body if top_level else list(ast.walk(tree))
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room_of(module: str) -> str | None:
    """The room of an imported `vdit_sparse...` module, None for other packages."""
    parts = module.split(".")
    if parts[0] != "vdit_sparse":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS[2:] + ROOMS[:1] else "vdit_sparse"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_run_one_way(file):
    room = name_of(file).split("/")[0]
    reached = {room_of(module) for module in imports_of(tree_of(file))} - {None}
    assert reached <= BELOW[room], f"{room} must not import {sorted(reached - BELOW[room])}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_libraries_stay_in_their_rooms(file):
    used = {module.split(".")[0] for module in imports_of(tree_of(file))}
    for library, homes in LIBRARIES.items():
        allowed = name_of(file).startswith(homes)
        assert library not in used or allowed, f"{library} belongs into {homes}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nobody_reads_the_environment_or_patches_others(file):
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv") or name_of(file) == "app/cli.py"
            assert ast.unparse(node) != "sys.path"
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                words = ast.unparse(target)
                assert not words.endswith(".forward") and ".__class__" not in words, words


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_asserts_and_prints_are_not_for_libraries(file):
    for node in ast.walk(tree_of(file)):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}: raise instead"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            assert name_of(file).startswith(PRINTS), f"print in line {node.lineno}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_stay_short(file):
    kernel = name_of(file).startswith("kernels/")
    assert len(file.read_text().splitlines()) <= (400 if kernel else 300)
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (120 if kernel else 40), f"{node.name} has {lines} lines"


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("vdit_sparse/methods/*.py", "method"),
        ("kernels/block_sparse/*.py", "backend"),
        ("eval/metrics/*.py", "metric"),
    ],
)
def test_siblings_do_not_import_each_other(pattern, what):
    files = [file for file in ROOT.glob(pattern) if file.name != "__init__.py"]
    siblings = {file.stem for file in files} - {"layout", "tiles"}
    assert files
    for file in files:
        for module in imports_of(tree_of(file)):
            home = name_of(file.parent).replace("/", ".")
            inside = re.match(rf"(vdit_sparse\.)?{home}\.(\w+)", module)
            other = inside and inside.group(2)
            assert other not in siblings - {file.stem}, f"{what} {file.stem} imports {other}"


def test_rooms_are_no_packages_of_their_own():
    # A regular package `kernels` on sys.path would shadow Hugging Face's package of that name.
    for room in set(ROOMS) - {"vdit_sparse"}:
        assert not (ROOT / room / "__init__.py").exists()


def test_importing_the_package_loads_neither_diffusers_nor_triton_nor_a_gpu():
    code = (
        "import vdit_sparse, vdit_sparse.methods, vdit_sparse.kernels.block_sparse, sys, torch;"
        "bad = {'diffusers', 'transformers', 'triton', 'gradio'} & set(sys.modules);"
        "assert not bad, bad; assert not torch.cuda.is_initialized()"
    )
    # torch itself may load triton: only what comes after it counts.
    code = f"import torch, sys; sys.modules.pop('triton', None); {code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_every_file_of_every_room(tmp_path):
    build = "import hatchling.build as b, sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], check=True, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    for file in FILES:
        home = name_of(file)
        inside = home if home.startswith("vdit_sparse/") else f"vdit_sparse/{home}"
        assert inside in packed
    assert any(name.startswith("vdit_sparse/pipelines/mini/transformer/") for name in packed)
