"""Local folders and a real S3-speaking server behind the same verbs."""

import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gtl import storage
from gtl.storage import Store, explain
from gtl.types import UserError


@pytest.fixture(params=["local", "s3", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(tmp_path / "store")
    return Store(request.getfixturevalue(request.param)).sub(uuid.uuid4().hex)


def keys(store: Store, prefix: str = "", recursive: bool = True) -> list[str]:
    return [key for key, _, _ in store.list(prefix, recursive)]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_an_object_is_written_read_and_replaced(store: Store) -> None:
    store.write("a/b.bin", b"first")
    assert store.read("a/b.bin") == b"first"
    store.write("a/b.bin", b"second")
    assert store.read("a/b.bin") == b"second"
    assert keys(store) == ["a/b.bin"]


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.write("empty", b"")
    assert store.exists("empty")
    assert store.read("empty") == b""


def test_part_of_an_object(store: Store) -> None:
    store.write("digits", b"0123456789")
    assert store.read_range("digits", 3, 4) == b"3456"
    assert store.read_range("digits", 8, 4) == b"89"


def test_a_folder_is_no_object(store: Store) -> None:
    store.write("a/b", b"x")
    assert [store.exists(key) for key in ("a/b", "a", "a/c", "c")] == [True, False, False, False]


def test_list_and_folders_are_sorted_and_relative_to_the_root(store: Store) -> None:
    before = time.time_ns()
    for key, size in (("b/2", 2), ("b/1/x", 1), ("a", 3)):
        store.write(key, b"." * size)
    assert [(key, size) for key, size, _ in store.list()] == [("a", 3), ("b/1/x", 1), ("b/2", 2)]
    assert all(abs(mtime - before) < 60e9 for _, _, mtime in store.list())
    assert keys(store, "b") == ["b/1/x", "b/2"]
    assert keys(store, "b", recursive=False) == ["b/2"]
    assert keys(store.sub("b")) == ["1/x", "2"]
    assert (store.folders(), store.folders("b"), store.folders("b/1")) == (["b"], ["1"], [])


def test_what_is_not_there_lists_as_nothing(store: Store) -> None:
    assert (keys(store, "none"), store.folders("none"), keys(store), store.folders()) == ([], [], [], [])


def test_reading_what_is_not_there_is_a_file_not_found(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("none")
    with pytest.raises(FileNotFoundError):
        store.read_range("none", 0, 1)
    with pytest.raises(FileNotFoundError):
        store.download("none", tmp_path / "out" / "file")
    assert files(tmp_path) == []


def test_delete_leaves_the_rest_and_may_be_repeated(store: Store) -> None:
    for key in ("a/1", "a/2", "b/1"):
        store.write(key, b"x")
    for _ in range(2):
        store.delete("a/1")
        assert keys(store) == ["a/2", "b/1"]
    for _ in range(2):
        store.delete_folder("b")
        assert keys(store) == ["a/2"]


def test_create_makes_an_object_once(store: Store) -> None:
    assert store.create("once", b"mine") is True
    assert store.create("once", b"yours") is False
    assert store.read("once") == b"mine"
    assert keys(store) == ["once"]


def test_of_many_that_create_one_wins(store: Store) -> None:
    if store.root.startswith("gs://"):
        pytest.skip("pyarrow cannot ask Google's buckets for it: two at the same moment may both make it")
    store.write("made/first", b"")  # so that the first use of the store is not part of the race
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: store.create("made/once", f"{i}".encode()), range(8)))
    assert sum(made) == 1
    assert store.read("made/once") == f"{made.index(True)}".encode()
    assert keys(store) == ["made/first", "made/once"]


def test_a_file_goes_up_and_comes_down(store: Store, tmp_path: Path) -> None:
    data = os.urandom(9 * 2**20)  # more than one part of a multipart upload
    (tmp_path / "source").write_bytes(data)
    store.upload(tmp_path / "source", "deep/er/file")
    assert list(store.list())[0][:2] == ("deep/er/file", len(data))
    assert store.download("deep/er/file", tmp_path / "new" / "target") == tmp_path / "new" / "target"
    assert (tmp_path / "new" / "target").read_bytes() == data
    assert files(tmp_path / "new") == ["target"]


def test_a_download_replaces_a_file(store: Store, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old and longer")
    store.write("key", b"new")
    store.download("key", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"new"


def test_a_missing_source_uploads_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.upload(tmp_path / "none", "key")
    assert keys(store) == []


def test_a_store_travels_to_other_processes(store: Store) -> None:
    store.write("key", b"x")
    again = pickle.loads(pickle.dumps(store))
    assert (again.root, again.read("key")) == (store.root, b"x")


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert Store("runs").url() == f"{tmp_path}/runs"
    assert Store("~/runs").url("a/b") == "/home/someone/runs/a/b"
    assert Store("file:///data/runs/").url("a") == "/data/runs/a"
    assert Store("/").url("a") == "/a"
    bucket = Store("s3://bucket/runs/")
    assert (bucket.url(), bucket.sub("a").url("b"), bucket.path("a")) == (
        "s3://bucket/runs", "s3://bucket/runs/a/b", "bucket/runs/a",
    )  # fmt: skip
    assert (Store("runs").is_local, Store("file:///runs").is_local, bucket.is_local) == (True, True, False)


def test_any_filesystem_that_fsspec_knows() -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    store.write("a/b", b"x")
    assert (store.read("a/b"), keys(store), store.folders(), store.exists("a/c")) == (b"x", ["a/b"], ["a"], False)
    assert (store.create("a/c", b"y"), store.create("a/c", b"z"), store.read("a/c")) == (True, False, b"y")


def test_a_google_bucket_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "GOOGLE_S", 1)
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nonexistent")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.delenv(storage.GOOGLE_EMULATOR, raising=False)
    with pytest.raises(UserError) as caught:
        Store("gs://bucket/folder").read("key")
    message = str(caught.value)
    assert message.startswith("gs://bucket/folder/key: the store cannot be reached or refuses (google::cloud::Status")
    assert message.endswith("; check the URL and Google's credentials") and "\n" not in message


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nope://bucket/x", "nope://bucket/x: no filesystem for nope:// is installed (Protocol not known: nope)"),
        (
            "s3://bucket?region=x",
            "s3://bucket?region=x: a bucket URL has no '?'; endpoint, region and credentials come from the environment",
        ),
        ("gcs://b?x", "gcs://b?x: a bucket URL has no '?'; endpoint, region and credentials come from the environment"),
        ("s3:///x", "s3:///x: names no bucket; expected s3://BUCKET/FOLDER"),
        ("gs://", "gs://: names no bucket; expected gs://BUCKET/FOLDER"),
        (
            "abfs://box@account.dfs.core.windows.net/x",
            "abfs://box@account.dfs.core.windows.net/x: no credentials for Azure; set AZURE_TENANT_ID, AZURE_CLIENT_ID "
            "and AZURE_CLIENT_SECRET, or install az and log in",
        ),
    ],
)
def test_a_url_that_nothing_opens(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.shutil, "which", lambda name: None)
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Store(url).read("key")


def test_a_hub_that_cannot_be_asked_is_one_line() -> None:
    """HF_HUB_OFFLINE is set in tests."""
    with pytest.raises(UserError) as caught:
        Store("hf://datasets/somebody/photos").write("key", b"x")
    message = str(caught.value)
    assert message.startswith(
        "hf://datasets/somebody/photos/key: the store cannot be reached or refuses (Cannot reach "
    )
    assert message.endswith("; check the URL, HF_TOKEN and that the hub can be reached") and "\n" not in message


def test_errors_of_client_libraries_are_explained_and_our_own_are_not() -> None:
    """Both kinds are none of OSError: pyarrow's of Azure, httpx's of the hub."""
    from httpx import ConnectError
    from pyarrow.lib import ArrowException, ArrowInvalid

    for url, error, end in (
        ("abfs://box@a.dfs.core.windows.net/x", ArrowException("Unknown error:\nno token"), storage.ADVICE["abfs"]),
        ("hf://datasets/a/b", ConnectError("no\nroute"), storage.ADVICE["hf"]),
        ("odd://x", ConnectError(""), "check the URL and the credentials"),
    ):
        with pytest.raises(UserError) as caught, storage.explained(url):
            raise error
        reason = " ".join(str(error).split()) or "ConnectError"
        assert str(caught.value) == f"{url}: the store cannot be reached or refuses ({reason}); {end}"
    for own in (KeyError("x"), TypeError("x"), ArrowInvalid("no Parquet")):
        with pytest.raises(type(own)), storage.explained("hf://datasets/a/b"):
            raise own


@pytest.mark.parametrize("verb", ["read", "write", "create", "list"])
def test_an_unreachable_bucket_is_one_line_within_seconds(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = Store("s3://bucket/x")
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: store.read("key"),
        "write": lambda: store.write("key", b"x"),
        "create": lambda: store.create("key", b"x"),
        "list": lambda: list(store.list("key")),
    }
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        calls[verb]()
    text = str(caught.value)
    assert text.startswith("s3://bucket/x/key: the store cannot be reached or refuses (")
    assert text.endswith("; check the URL, AWS_ENDPOINT_URL and the credentials")
    assert "\n" not in text
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_missing_bucket_is_named(kind: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(kind)
    store = Store(f"{kind}://no-such-bucket-here/x")
    message = "there is no such bucket; create it or correct the URL"
    for call in (
        lambda: store.write("key", b"x"),
        lambda: store.create("key", b"x"),
        lambda: list(store.list("key")),
        lambda: store.folders("key"),
    ):
        with pytest.raises(UserError, match=f"^{kind}://no-such-bucket-here/x/key: {message}$"):
            call()
    with pytest.raises(FileNotFoundError):
        store.read("key")


def test_a_full_disk_is_named_and_nothing_half_written_stays(small_disk: Path, tmp_path: Path) -> None:
    store = Store(small_disk)
    store.write("kept", b"before")
    big = os.urandom(2 * 2**20)
    (tmp_path / "big").write_bytes(big)
    elsewhere = Store(tmp_path)
    calls = {
        "new": lambda: store.write("new", big),
        "kept": lambda: store.write("kept", big),
        "once": lambda: store.create("once", big),
        "up": lambda: store.upload(tmp_path / "big", "up"),
        "down": lambda: elsewhere.download("big", small_disk / "down"),
    }
    for key, call in calls.items():
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value) == f"{small_disk}/{key}: the disk is full; free some space and go on with --resume"
    assert files(small_disk) == ["kept"]
    assert store.read("kept") == b"before"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_bytes(b"")
    with pytest.raises(UserError, match=f"^{tmp_path}/runs/a/b: (Not a directory|File exists)$"):
        Store(tmp_path / "runs").write("a/b", b"x")


def test_quota_and_full_disk_read_the_same() -> None:
    full, quota = (explain(OSError(code, os.strerror(code)), "/runs") for code in (errno.ENOSPC, errno.EDQUOT))
    assert full == quota == "the disk is full; free some space and go on with --resume"


WRITER = """
import sys
from gtl.storage import Store
store = Store(sys.argv[1])
print("ready", flush=True)
while True:
    for byte in (b"a", b"b"):
        store.write("object", byte * 200_000)
"""


def test_a_killed_writer_leaves_a_whole_object(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        while not store.exists("object"):
            time.sleep(0.005)
        seen = {store.read("object") for _ in range(200)}
        writer.send_signal(signal.SIGKILL)
    assert seen | {store.read("object")} <= {b"a" * 200_000, b"b" * 200_000}
    assert keys(store) == ["object"]
