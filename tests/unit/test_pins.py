"""The pins fit the ranges, and the guards of pre-commit see what they guard against."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
# What these bring is the user's to choose; the tests run without them.
UNTESTED = {"fid", "tracking"}


def test_every_tested_requirement_has_a_pin_inside_its_range() -> None:
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in PINS}
    extras = PROJECT["optional-dependencies"]
    tested = [r for name, requirements in extras.items() if name not in UNTESTED for r in requirements]
    wanted = [Requirement(text) for text in (*PROJECT["dependencies"], *tested)]
    assert [str(r) for r in wanted if r.name != "gtl" and pins.get(canonicalize_name(r.name)) not in r.specifier] == []


def test_pins_are_exact_one_each_and_name_no_place() -> None:
    assert PINS[0].name == "torch"
    assert all([s.operator for s in pin.specifier] == ["=="] and pin.url is None for pin in PINS)
    assert all("+" not in str(pin.specifier) for pin in PINS)
    names = [canonicalize_name(pin.name) for pin in PINS]
    assert len(set(names)) == len(names)
    assert names[1:] == sorted(names[1:])


def guard(name: str, file: Path) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / ".ci" / "guards.py"), name, str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("name", "good", "bad", "complaint"),
    [
        ("end-of-file", b"a\n", b"a", "does not end with exactly one newline"),
        ("end-of-file", b"", b"a\n\n", "does not end with exactly one newline"),
        ("size", b"." * 250_000, b"." * 250_001, "250001 bytes, above 250000"),
        (
            "private-key",
            b"-----BEGIN PUBLIC KEY-----\n",
            b"x\n-----BEGIN RSA " + b"PRIVATE KEY-----\n",
            "holds a private key",
        ),
        ("private-key", b"PRIVATE KEY\n", b"-----BEGIN " + b"PRIVATE KEY-----\n", "holds a private key"),
    ],
)
def test_a_guard(name: str, good: bytes, bad: bytes, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(good)
    assert guard(name, file) == (0, "")
    file.write_bytes(bad)
    assert guard(name, file) == (1, f"{file}: {complaint}\n")


def test_every_hook_runs_from_the_project_itself() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert [hook["id"] for hook in hooks] == ["ruff", "mypy", "end-of-file", "size", "private-key"]
    assert {hook["language"] for hook in hooks} == {"system"}
