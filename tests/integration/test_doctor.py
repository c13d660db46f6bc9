"""`gtl doctor` looks by using things: processes that talk, stores that are written, a cluster that is joined."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from gtl import doctor
from gtl.cli import main


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_everything_is_looked_at(ray_cluster: None, here: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GTL_REGISTRY", f"{s3}/doctor")
    seen: list[str] = []
    findings = {f.subject: f for f in doctor.examine(lambda phase, done, total, detail="": seen.append(detail))}
    assert seen == ["versions", "devices", "compiler", "communication", "cluster", "stores", "hub"]
    assert [f for f in findings.values() if f.state == "missing"] == []
    assert {"python", "torch", "deepspeed", "cpu", "gloo", "ray", "runs", "cache", "registry", "hub"} <= set(findings)
    assert findings["registry"].detail.startswith(f"{s3}/doctor: written in ")
    assert list(here.iterdir()) == []  # what was made for the look is gone


def test_what_is_missing_is_named_and_the_status_is_1(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "file").write_text("no folder")
    monkeypatch.setenv("GTL_RUNS", str(here / "file" / "runs"))
    monkeypatch.setattr(doctor, "LOOKS", (doctor.stores,))
    monkeypatch.setattr(sys, "argv", ["gtl", "doctor", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    runs, cache, registry = json.loads(capsys.readouterr().out)
    assert runs["state"] == "missing"
    assert runs["detail"].startswith(f"GTL_RUNS: {here}/file/runs")
    assert (cache["state"], registry["state"]) == ("ok", "ok")


def test_two_processes_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GROUP", "raise SystemExit('no such interface')")
    assert [(f.subject, f.state, f.detail) for f in doctor.communication()] == [
        ("gloo", "missing", "no such interface")
    ]  # fmt: skip


def test_a_library_out_of_its_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=99", "no-such-library>=1", "pyyaml>=6", "mlflow-skinny; extra == 'tracking'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    _, torch, library, yaml = doctor.versions()
    assert (torch.state, library.state, yaml.state) == ("missing", "missing", "ok")
    assert torch.detail.endswith("but gtl needs >=99; pip install 'torch>=99'")
    assert library.detail == "not installed; pip install 'no-such-library>=1'"


def test_a_checkout_that_is_not_installed_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.requires", missing)
    python, gtl = doctor.versions()
    assert (python.state, gtl.subject, gtl.state) == ("ok", "gtl", "warning")
