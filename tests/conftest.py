"""Fixtures of all tests, and the environment that they and the processes they start run in."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.ports import free_port

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"
BUCKET = "gtl-tests"
ALONE = ("test_interop", "test_wheel")
"""Files among those of the cluster that do without it."""
TOGETHER = ("engine", "integration", "serving")
"""Folders whose files share a group of processes or a cluster."""
LONGEST = (*TOGETHER, "test_pairs", "test_footprint", "test_flow", "test_bench", "test_families")


# Set before anything is imported or started: workers of the one Ray cluster inherit it. The S3 address is that of the
# server that the `s3` fixture starts; a test that forgets the fixture finds a closed port instead of somebody's bucket.
S3_PORT = free_port()
os.environ.update(
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # as nice as the tests beside them, or these would take all there is
    TOKENIZERS_PARALLELISM="false",
    AWS_ENDPOINT_URL=f"http://127.0.0.1:{S3_PORT}",
    AWS_ACCESS_KEY_ID="testing",
    AWS_SECRET_ACCESS_KEY="testing",
    AWS_DEFAULT_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
for variable in ("GTL_RUNS", "GTL_CACHE", "GTL_REGISTRY", "RAY_ADDRESS", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3"):
    os.environ.pop(variable, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_without_gpu(items)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: turn_of(scope_of(item.nodeid)))


def turn_of(scope: str) -> int:
    """The longest first, so that no process waits for another at the end."""
    return LONGEST.index(scope) if scope in LONGEST else len(LONGEST)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the two longest scopes go first where all want the same cores.

    The engine's processes wait for each other at every step and leave half of what there is, but make slow progress if
    they have to queue. Both scopes are the first of their process, so that this one too gives way when it is through.
    """
    if hasattr(item.config, "workerinput") and scope_of(item.nodeid) not in LONGEST[:2] and os.nice(0) == 0:
        os.nice(5)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = scope_of
    return scheduler


def scope_of(nodeid: str) -> str:
    """What stays together in one of several processes, since it shares what is slow to start.

    That is the cluster, a group of processes or the models of a file.
    """
    file = Path(nodeid.partition("::")[0])
    return file.parent.name if file.parent.name in TOGETHER and file.stem not in ALONE else file.stem


def skip_without_gpu(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of real photographs, one sub-folder a subject."""
    if not PHOTOS.is_dir():
        pytest.skip(f"the photographs are not there: {PHOTOS}")
    return PHOTOS


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The one Ray cluster of a test session, started by the first test that asks for it."""
    import ray

    # address="local": never join a cluster that happens to run here. Logical CPUs, so that two workers and the
    # actors that feed them fit on a small machine.
    ray.init(address="local", num_cpus=3, include_dashboard=False, object_store_memory=256 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a registry with adapters for the built-in model; see `tests.endpoint.fill_registry`."""
    from tests.endpoint import fill_registry

    folder = tmp_path_factory.mktemp("registry")
    fill_registry(folder)
    return folder


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, shelf: Path) -> Iterator[str]:
    """URL of an endpoint that serves the shelf."""
    from tests.endpoint import serving

    with serving(shelf, free_port()) as url:
        yield url


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a bucket on a server that speaks S3, in a process of its own."""
    pytest.importorskip("moto", reason="moto is not installed; it comes with the extra `dev`")
    log = tmp_path_factory.mktemp("s3") / "server.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(S3_PORT)]
    with log.open("wb") as sink, subprocess.Popen(command, stdout=sink, stderr=sink) as server:
        try:
            wait_for_port(server, log, S3_PORT)
            from pyarrow.fs import S3FileSystem

            S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True).create_dir(
                BUCKET
            )
            yield f"s3://{BUCKET}"
        finally:
            server.terminate()


@pytest.fixture(scope="session")
def gs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a bucket on a server that speaks as Google's does, in a process of its own."""
    module = "gcp_storage_emulator"
    pytest.importorskip(module, reason="gcp-storage-emulator is not installed; it comes with the extra `dev`")
    port, log = free_port(), tmp_path_factory.mktemp("gs") / "server.log"
    command = [sys.executable, "-m", module, "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory"]
    with log.open("wb") as sink, pytest.MonkeyPatch.context() as patch:
        with subprocess.Popen([*command, "--default-bucket", "gtl-tests"], stdout=sink, stderr=sink) as server:
            try:
                wait_for_port(server, log, port)
                patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
                yield "gs://gtl-tests"
            finally:
                server.terminate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own with 1 MiB, to run full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def wait_for_port(server: "subprocess.Popen[bytes]", log: Path, port: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"the server of a bucket did not start:\n{log.read_text()}")
