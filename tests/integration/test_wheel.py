"""The built wheel, installed into an empty environment outside the tree, holds what gtl needs beside its code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, gtl
from pathlib import Path
from gtl.config import load_recipe
from gtl.report.page import render
from gtl.report.run import Run
root = Path(gtl.__file__).parent
recipes = sorted(root.glob("recipes/**/*.yaml"))
print(json.dumps({
    "root": str(root),
    "recipes": [str(file.relative_to(root)) for file in recipes if load_recipe(file)],
    "page": render([
        Run("dog", "v1", "runs/dog/v1", {}, "", [{"step": 1.0, "loss": 2.0}], None, None, [], 0, {}, [])
    ])[:15],
    "typed": (root / "py.typed").is_file(),
    "built in": sorted(str(file.relative_to(root)) for file in root.glob("*/builtin/**/*") if file.is_file()),
}))
"""


def no_source(folder: str, names: list[str]) -> list[str]:
    """Of the names in a folder of the tree, those that are made and not written."""
    if Path(folder) != ROOT:
        return [name for name in names if name == "__pycache__"]
    made = ("build", "dist", "runs", "cache", "registry", "out", "demo")
    return [name for name in names if name in made or name.startswith(".") or name.endswith(".egg-info")]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel alone, which finds the libraries where this one has them."""
    folder = tmp_path_factory.mktemp("wheel")
    # What an earlier build left in the tree would be packed again, whether its pattern is still there or not.
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=no_source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = ["wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, *build], check=True, cwd=folder)
    (wheel,) = folder.glob("gtl-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, cwd=folder)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_has_recipes_model_and_types(python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert Path(answer["root"]).is_relative_to(python.parents[1])
    ours = sorted(str(file.relative_to(ROOT / "gtl")) for file in (ROOT / "gtl").glob("recipes/**/*.yaml"))
    assert answer["recipes"] == ours
    assert answer["typed"]
    assert answer["page"] == "<!DOCTYPE html>"
    files = (file for file in (ROOT / "gtl").glob("*/builtin/**/*") if file.is_file())
    assert answer["built in"] == sorted(str(file.relative_to(ROOT / "gtl")) for file in files)


def test_the_built_in_model_is_small() -> None:
    folder = ROOT / "gtl" / "families" / "builtin" / "tiny"
    assert (folder / "model_index.json").is_file()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 8_000_000
