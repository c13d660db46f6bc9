"""Machines of their own on this one: Linux namespaces with addresses, names and disks that others do not see.

Where namespaces are refused they are groups of processes on loopback, each with a folder as its disk.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
SUBNET = "10.213.77"
LOOPBACK = "127.0.0.1"
STORE, HEAD = 200, 1
"""Last numbers of their addresses; workers have 2 and more."""
BUCKET = "cluster"
START_S = 120.0
ENTER = """
hostname "$1"; mount --bind "$2" "$3"; mount --bind "$4" /etc/hosts; shift 4; cd "$1"; shift; exec "$@"
"""
"""What a process does before it becomes what it is to be: its name, its disk, the names of all, its folder."""


def refusal() -> str:
    """Why this machine lets us make none; empty if it does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not all(shutil.which(tool) for tool in ("ip", "unshare", "mount", "hostname")):
        return "network namespaces need ip (iproute2), unshare, mount and hostname"
    name = f"gtl-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces are refused: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


def tool(*command: str) -> None:
    """A command that has to work."""
    subprocess.run(command, check=True, capture_output=True)


class Ports(NamedTuple):
    """Of what others connect to."""

    gcs: int = 6379
    dashboard: int = 8265
    s3: int = 5000
    http: int = 8000


@dataclass
class Host:
    """One machine: a network namespace, and a folder that is its disk."""

    number: int
    """Last of its address."""
    space: str
    """Its network namespace; empty: it has none, and its address is loopback's."""
    disk: Path
    """Where its disk is, for who looks from outside; inside it is `Hosts.disk`, as on every other."""
    started: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"host{self.number}"

    @property
    def address(self) -> str:
        return f"{SUBNET}.{self.number}" if self.space else LOOPBACK


class Hosts:
    """A network of hosts with an S3 server, and nothing else that they share; a switch that can be unplugged."""

    def __init__(self, base: Path, isolated: bool = True) -> None:
        self.isolated = isolated
        self.ports = Ports() if isolated else Ports(*(free_port() for _ in Ports._fields))
        self.base, self.disk, self.names = base, base / "disk", base / "hosts"
        """Where every host sees its own disk."""
        self._switch, self._hosts = f"gtl{os.getpid()}-s", dict[int, Host]()
        self.disk.mkdir()
        numbers = [HEAD, *range(2, 10), STORE]
        lines = ["127.0.0.1 localhost", *(f"{SUBNET}.{number} host{number}" for number in numbers)]
        self.names.write_text("\n".join(lines) + "\n")
        if not isolated:
            return
        tool("ip", "netns", "add", self._switch)
        tool("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
        tool("ip", "-n", self._switch, "link", "set", "switch", "up")

    def add(self, number: int) -> Host:
        """A host with an empty disk."""
        space = f"gtl{os.getpid()}-{number}" if self.isolated else ""
        host = Host(number, space, self.base / f"host{number}")
        shutil.rmtree(host.disk, ignore_errors=True)
        for folder in ("tmp", "home"):
            (host.disk / folder).mkdir(parents=True)
        self._hosts[number] = host
        if not self.isolated:
            return host
        plug = f"plug{number}"
        tool("ip", "netns", "add", host.space)
        tool("ip", "-n", self._switch, "link", "add", plug, "type", "veth", "peer", "eth0", "netns", host.space)
        tool("ip", "-n", self._switch, "link", "set", plug, "master", "switch")
        tool("ip", "-n", self._switch, "link", "set", plug, "up")
        tool("ip", "-n", host.space, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            tool("ip", "-n", host.space, "link", "set", device, "up")
        return host

    def start(self, host: Host, *command: str, log: str, **more: str) -> "subprocess.Popen[bytes]":
        """Start a command on a host; what it says goes into a file of that name beside its disk."""
        with (self.base / f"{host.name}-{log}.log").open("ab") as sink:
            one = subprocess.Popen(
                [*self._entered(host), *command], env=self._environment(host, more), cwd=host.disk, stdout=sink,
                stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        host.started.append(one)
        return one

    def run(self, host: Host, *command: str, timeout: float = 600, **more: str) -> str:
        """What a command on a host prints until it ends well."""
        done = subprocess.run(
            [*self._entered(host), *command], env=self._environment(host, more), cwd=host.disk,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def said(self, host: Host, log: str) -> str:
        """What a command has said so far."""
        return (self.base / f"{host.name}-{log}.log").read_text(errors="replace")

    def kill(self, host: Host) -> None:
        """The power goes out: every process of it at once, and its address; its disk is as it was."""
        while there := self._processes(host):  # more than once: some are just being started
            for pid in there:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for one in host.started:
            one.wait()
        if self.isolated:
            tool("ip", "netns", "delete", host.space)
        del self._hosts[host.number]

    def unplug(self, host: Host) -> None:
        """Nothing comes or goes any more; nobody is told."""
        tool("ip", "-n", self._switch, "link", "set", f"plug{host.number}", "down")

    def plug(self, host: Host) -> None:
        """As before."""
        tool("ip", "-n", self._switch, "link", "set", f"plug{host.number}", "up")

    def close(self) -> None:
        """End them all."""
        for host in list(self._hosts.values()):
            self.kill(host)
        if self.isolated:
            tool("ip", "netns", "delete", self._switch)

    def _processes(self, host: Host) -> list[int]:
        if not self.isolated:
            with suppress(psutil.NoSuchProcess):
                roots = [psutil.Process(one.pid) for one in host.started if one.poll() is None]
                return [one.pid for root in roots for one in (*root.children(recursive=True), root)]
            return []
        told = subprocess.run(["ip", "netns", "pids", host.space], check=True, capture_output=True, text=True)
        return [int(pid) for pid in told.stdout.split()]

    def _entered(self, host: Host) -> list[str]:
        if not self.isolated:
            return []
        spaces = ["ip", "netns", "exec", host.space, "unshare", "--mount", "--uts", "sh", "-ec", ENTER, "sh"]
        return [*spaces, host.name, str(host.disk), str(self.disk), str(self.names), str(self.disk)]

    def _environment(self, host: Host, more: dict[str, str]) -> dict[str, str]:
        disk = self.disk if self.isolated else host.disk
        store = f"{SUBNET}.{STORE}" if self.isolated else LOOPBACK
        own = {
            "PYTHONPATH": str(ROOT), "HOME": f"{disk}/home", "TMPDIR": f"{disk}/tmp",
            "XDG_CACHE_HOME": f"{disk}/home/cache", "AWS_ENDPOINT_URL": f"http://{store}:{self.ports.s3}",
            "RAY_TMPDIR": f"{disk}/tmp",
        }  # fmt: skip
        return {**os.environ, **own, **more}


@dataclass
class RayHosts:
    """A Ray cluster whose nodes are hosts, with a bucket in place of a shared disk."""

    hosts: Hosts
    store: Host
    head: Host
    workers: dict[int, Host] = field(default_factory=dict)

    def add_worker(self, number: int, cpus: int = 1) -> Host:
        """A node with so many CPUs, there when Ray counts it."""
        host, before = self.hosts.add(number), self._begun(number)
        started = self.hosts.start(
            host, RAY, "start", "--address", f"{self.head.address}:{self.hosts.ports.gcs}", "--node-ip-address",
            host.address, "--num-cpus", str(cpus), *NODE, "--block", log="ray",
        )  # fmt: skip
        self.workers[number] = host
        # On loopback Ray has one folder for all nodes, in which two that begin at once take the same names.
        end = time.monotonic() + START_S
        while not self.hosts.isolated and self._begun(number) == before:
            assert started.poll() is None and time.monotonic() < end, self.hosts.said(host, "ray")[-3000:]
            time.sleep(0.1)
        return host

    def _begun(self, number: int) -> int:
        """How many nodes have begun on the hosts that had this number."""
        log = self.hosts.base / f"host{number}-ray.log"
        return log.read_text(errors="replace").count("Ray runtime started.") if log.exists() else 0

    def kill(self, number: int) -> None:
        self.hosts.kill(self.workers.pop(number))

    def gtl(self, *command: str, log: str, **more: str) -> "subprocess.Popen[bytes]":
        """A command of gtl's on the head."""
        address = {"RAY_ADDRESS": f"{self.head.address}:{self.hosts.ports.gcs}"}
        return self.hosts.start(
            self.head, sys.executable, "-c", "from gtl.cli import main; main()", *command, log=log, **address, **more
        )


RAY = str(Path(sys.executable).with_name("ray"))
NODE = ("--object-store-memory", str(100 * 2**20), "--disable-usage-stats")


@contextmanager
def ray_hosts(isolated: bool) -> Iterator[RayHosts]:
    """A store and a head without work; workers are added."""
    with tempfile.TemporaryDirectory(prefix="gtl", dir="/tmp") as base:  # short: Ray's sockets have long names
        hosts = Hosts(Path(base), isolated)
        try:
            store, head = hosts.add(STORE), hosts.add(HEAD)
            hosts.start(
                store, sys.executable, "-m", "moto.server", "-H", store.address, "-p", str(hosts.ports.s3), log="s3"
            )
            hosts.start(
                head, RAY, "start", "--head", "--node-ip-address", head.address, "--port", str(hosts.ports.gcs),
                "--num-cpus", "0", "--dashboard-host", head.address, "--dashboard-port", str(hosts.ports.dashboard),
                *NODE, "--block", log="ray",
            )  # fmt: skip
            hosts.run(head, sys.executable, "-c", MAKE_BUCKET, timeout=START_S)
            yield RayHosts(hosts, store, head)
        finally:
            hosts.close()


MAKE_BUCKET = f"""
import os, time
from pyarrow.fs import S3FileSystem
store = S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True)
for _ in range(100):
    try:
        store.create_dir("{BUCKET}")
        break
    except OSError:
        time.sleep(0.5)
else:
    raise SystemExit("the S3 server does not answer")
"""
