"""Stores that fail: a bucket that stalls or loses half of what goes through it, a full disk, a damaged file.

What stands, what is found, and what is said.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gtl import families
from gtl.storage import Store
from gtl.train.checkpoint import Shapes, State, complete, latest, load, save, step_key
from gtl.train.job import CHECKPOINTS, RESULT, Job
from gtl.train.track import read_rows
from gtl.train.worker import run
from gtl.types import UserError
from tests.engine.group import Group
from tests.engine.runs import learned, make_job
from tests.proxy import Fault, Kind, Proxy

SHAPES: dict[str, Shapes] = {"denoiser": {"a.weight": (64, 33), "b": (5,)}}
UNREACHABLE = "the store cannot be reached or refuses ("
LONG_S = 120
"""Says only that nothing hangs: what has to end within it takes seconds."""


@pytest.fixture
def proxy(s3: str) -> Iterator[Proxy]:
    with Proxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])) as running:
        yield running


@pytest.fixture
def store(s3: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A folder of the bucket, through the proxy, with a patience of a second."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr("gtl.storage.SILENCE_S", 1)
    return Store(s3).sub(uuid.uuid4().hex)


def make_states(step: int) -> dict[str, State]:
    generator = torch.Generator().manual_seed(step)
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    shapes = SHAPES["denoiser"]
    tensors = {name: {kind: torch.randn(shapes[name], generator=generator) for kind in kinds} for name in shapes}
    return {"denoiser": State(step, tensors)}


def put(store: Store, step: int) -> str:
    key = step_key(CHECKPOINTS, step)
    save(store, key, make_states(step), {"step": step})
    return key


def check(store: Store, key: str, step: int) -> None:
    """The checkpoint is the newest, and bit for bit what was saved."""
    again = Store(store.root)
    assert latest(again, CHECKPOINTS) == key
    found = load(again, key, SHAPES)
    assert found.step == step
    tensors = dict(found.tensors("denoiser"))
    for name, kinds in make_states(step)["denoiser"].tensors.items():
        for kind, value in kinds.items():
            assert torch.equal(tensors[name][kind], value)


def slow(*values: object) -> Any:
    """A case that is left to `make soak`: a stalled upload ends after half a minute, others say nothing new."""
    return pytest.param(*values, marks=pytest.mark.soak)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("cut request", "denoiser.safetensors"),
        ("refuse", "manifest.json"),
        slow("cut request", "manifest.json"),
        slow("refuse", "denoiser.safetensors"),
        slow("stall", "denoiser.safetensors"),
        slow("stall", "manifest.json"),
    ],
)
def test_a_save_that_fails_leaves_the_checkpoint_before(store: Store, proxy: Proxy, kind: Kind, part: str) -> None:
    before = put(store, 2)
    proxy.faults = [Fault(kind, "PUT", part)]
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        put(store, 4)
    assert time.monotonic() - begun < LONG_S
    assert str(caught.value).startswith(f"{store.url(step_key(CHECKPOINTS, 4))}/{part}: {UNREACHABLE}")
    assert "\n" not in str(caught.value)
    assert proxy.spoiled == [("PUT", kind)] * 3  # it was tried again
    proxy.faults = []
    check(store, before, 2)
    check(store, put(store, 4), 4)


@pytest.mark.parametrize("put_kind", ["cut request", slow("refuse"), slow("cut answer"), slow("stall")])
@pytest.mark.parametrize("get_kind", ["cut answer", slow("refuse"), slow("stall")])
def test_what_fails_once_is_done_again(store: Store, proxy: Proxy, put_kind: Kind, get_kind: Kind) -> None:
    proxy.faults = [Fault(put_kind, "PUT", part, left=1) for part in ("denoiser.safetensors", "manifest.json")]
    key = put(store, 2)
    assert proxy.spoiled == [("PUT", put_kind)] * 2
    asked = ("list-type", "manifest.json", "denoiser.safetensors")
    proxy.faults = [Fault(get_kind, "GET", part, left=1) for part in asked]
    check(store, key, 2)
    assert proxy.spoiled[2:] == [("GET", get_kind)] * 3


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("cut answer", "denoiser.safetensors"),
        ("refuse", "manifest.json"),
        slow("cut answer", "manifest.json"),
        slow("refuse", "denoiser.safetensors"),
        slow("stall", "denoiser.safetensors"),
        slow("stall", "manifest.json"),
    ],
)
def test_a_store_out_of_reach_is_not_taken_for_a_damaged_checkpoint(
    store: Store, proxy: Proxy, kind: Kind, part: str
) -> None:
    """To remove it, as is said of a damaged one, would lose it for the store's fault."""
    key = put(store, 2)
    proxy.faults = [Fault(kind, "GET", part)]
    with pytest.raises(UserError) as caught:
        dict(load(store, key, SHAPES).tensors("denoiser"))
    assert str(caught.value).startswith(f"{store.url(key)}/{part}: {UNREACHABLE}")
    proxy.faults = []
    check(store, key, 2)


@pytest.mark.parametrize("part", ["denoiser.safetensors", "manifest.json"])
def test_half_of_a_file_that_is_called_all_of_it_is_read_again(store: Store, proxy: Proxy, part: str) -> None:
    """pyarrow gives as many bytes as were asked for, and in the second half whatever was in memory there."""
    key = put(store, 2)
    proxy.faults = [Fault("half answer", "GET", part, left=1)]
    check(store, key, 2)
    assert proxy.spoiled == [("GET", "half answer")]


def test_what_is_replaced_between_two_requests_is_read_again(store: Store, proxy: Proxy) -> None:
    """A bucket is asked how long an object is, and then for so much of what stands in its place by then."""
    longer = b"a longer one, by far"
    store.write("moving", b"short")
    proxy.faults = [Fault("meanwhile", "GET", "moving", left=1, act=lambda: store.write("moving", longer))]
    assert store.read("moving") == longer
    assert proxy.spoiled == [("GET", "meanwhile")]


@pytest.mark.parametrize("kind", ["half answer", "cut answer", slow("stall")])
def test_a_list_that_comes_by_half_is_no_empty_run(store: Store, proxy: Proxy, kind: Kind) -> None:
    """A run that found no checkpoint would begin at its first step and write over those that are there."""
    put(store, 2)
    put(store, 4)
    proxy.faults = [Fault(kind, "GET", "list-type")]
    with pytest.raises(UserError, match=f"^{re.escape(store.url(CHECKPOINTS))}: {re.escape(UNREACHABLE)}"):
        latest(store, CHECKPOINTS)


@pytest.mark.parametrize("verb", ["write", "upload"])
@pytest.mark.parametrize(
    ("kind", "method", "part"),
    [
        ("cut request", "PUT", "partNumber=2"),
        slow("refuse", "POST", "uploadId"),
        slow("stall", "PUT", "partNumber=2"),
    ],
)
def test_of_many_parts_none_is_left_out(
    store: Store, proxy: Proxy, tmp_path: Path, verb: str, kind: Kind, method: str, part: str
) -> None:
    old, new = b"old", os.urandom(21 * 2**20)
    (tmp_path / "new").write_bytes(new)

    def replace_it() -> None:
        if verb == "write":
            store.write("large", new)
        else:
            store.upload(tmp_path / "new", "large")

    store.write("large", old)
    proxy.faults = [Fault(kind, method, part)]
    with pytest.raises(UserError, match=f"^{re.escape(store.url('large'))}: {re.escape(UNREACHABLE)}"):
        replace_it()
    assert (method, kind) in proxy.spoiled
    proxy.faults = []
    assert store.read("large") == old
    replace_it()
    assert store.read("large") == new


@pytest.mark.soak
@pytest.mark.parametrize("verb", ["save", "write of many parts", "load", "latest", "create"])
def test_a_store_that_never_answers_is_given_up(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """With the patience that everybody has."""
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    key = put(store, 2)
    slow_one = "partNumber" if "parts" in verb else ""
    proxy.faults = [Fault("stall", method, slow_one) for method in ("GET", "HEAD", "PUT", "DELETE", "POST")]
    begun = time.monotonic()
    with pytest.raises(UserError, match=re.escape(UNREACHABLE)):
        if verb == "save":
            put(store, 4)
        elif verb == "load":
            dict(load(store, key, SHAPES).tensors("denoiser"))
        elif verb == "latest":
            latest(store, CHECKPOINTS)
        elif verb == "create":
            store.create("new", b"")
        else:
            store.write("new", os.urandom(21 * 2**20))
    seconds = time.monotonic() - begun
    print(f"{verb}: given up after {seconds:.0f} s")
    assert seconds < 180
    proxy.faults = []
    check(store, key, 2)


def train(job: Job, endpoint: str | None = None) -> str:
    """One worker's run, with its buckets behind an address; what it says where it fails."""
    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = endpoint or before
    try:
        run(job, torch.device("cpu"), lambda row: None)
    except UserError as error:
        return str(error)
    finally:
        os.environ["AWS_ENDPOINT_URL"] = before
    return ""


def test_a_run_whose_bucket_fails_goes_on_from_its_last_checkpoint(
    solo: Group, s3: str, proxy: Proxy, tmp_path: Path
) -> None:
    straight = make_job(tmp_path)
    storage: dict[str, Any] = straight.recipe["storage"] | {"runs": f"{s3}/{uuid.uuid4().hex}"}
    job = replace(straight, recipe={**straight.recipe, "storage": storage})
    proxy.faults = [Fault("cut request", "PUT", f"{CHECKPOINTS}/00000006/denoiser")]
    (said,) = solo.run(train, job, proxy.url)
    assert said.startswith(f"{job.run.url(CHECKPOINTS)}/00000006/denoiser.safetensors: {UNREACHABLE}")
    assert "\n" not in said
    assert complete(job.run, CHECKPOINTS) == [f"{CHECKPOINTS}/{step:08d}" for step in (2, 4)]
    assert not job.run.exists(RESULT)
    proxy.faults = [Fault("cut answer", "GET", f"{CHECKPOINTS}/00000004/denoiser", left=1)]
    assert solo.run(train, job, proxy.url) == [""]
    assert not proxy.faults[0].left
    assert solo.run(train, straight) == [""]
    assert learned(job) == learned(straight)


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(solo: Group, small_disk: Path, tmp_path: Path) -> None:
    straight = make_job(tmp_path, checkpoints={"every": 2, "keep": 1})
    assert solo.run(train, straight) == [""]
    storage = straight.recipe["storage"] | {"runs": str(small_disk)}
    job = replace(straight, recipe={**straight.recipe, "storage": storage})
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(500 * 2**10))  # leaves room for one checkpoint of 350 KiB, not for the next beside it
    (said,) = solo.run(train, job)
    key = f"{CHECKPOINTS}/00000004/denoiser.safetensors"
    assert said == f"{job.run.url(key)}: the disk is full; free some space and go on with --resume"
    assert complete(job.run, CHECKPOINTS) == [f"{CHECKPOINTS}/00000002"]
    assert not job.run.exists(RESULT)
    ballast.unlink()
    assert solo.run(train, job) == [""]
    assert learned(job) == learned(straight)
    assert [row["step"] for row in read_rows(job.run)] == list(range(1, 10))


def damaged(file: Path, how: str) -> None:
    """Cut a file off, or change a byte in its middle."""
    data = bytearray(file.read_bytes())
    if how == "truncated":
        del data[-100:]
    else:
        data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("how", "message"), [
    ("truncated", r"\d+ bytes, its manifest says \d+; remove this checkpoint to go on from the one before"),
    ("changed", "changed since it was written; remove this checkpoint to go on from the one before"),
])  # fmt: skip
def test_a_run_names_a_damaged_checkpoint_and_goes_on_from_the_one_before(
    solo: Group, tmp_path: Path, how: str, message: str
) -> None:
    job = make_job(tmp_path)
    assert solo.run(train, job) == [""]
    adapter = learned(job)
    job.run.delete(RESULT)
    newest = Path(job.run.url()) / CHECKPOINTS / "00000009"
    damaged(newest / "denoiser.safetensors", how)
    (said,) = solo.run(train, job)
    assert re.fullmatch(f"{newest}/denoiser.safetensors: {message}", said)
    shutil.rmtree(newest)  # as it says
    assert solo.run(train, job) == [""]
    assert learned(job) == adapter


def test_a_run_names_a_truncated_file_of_its_model(solo: Group, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(Path(families.__file__).parent / "builtin" / "tiny", folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    damaged(weights, "truncated")
    job = make_job(tmp_path)
    (said,) = solo.run(train, replace(job, recipe={**job.recipe, "model": {"source": str(folder)}}))
    assert said.startswith(f"{weights}: damaged (")
    assert said.endswith("; get the file again")
    assert "\n" not in said


def train_behind(job: Job) -> str:
    """`train`, but what the second rank lists is as old as step 6, as some network file systems have it for a while."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr("gtl.train.checkpoint.complete", lambda store, prefix: [f"{prefix}/00000006"])
        return train(job)


def test_all_ranks_go_on_from_what_the_first_one_finds(duo: Group, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert duo.run(train, job) == ["", ""]
    adapter = learned(job)
    job.run.delete(RESULT)
    shutil.rmtree(Path(job.run.url()) / CHECKPOINTS / "00000009")
    assert duo.run(train_behind, job) == ["", ""]
    assert learned(job) == adapter
