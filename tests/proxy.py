"""A TCP proxy in front of an HTTP server, which spoils requests that a test chooses, as bad networks and stores do."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["stall", "cut answer", "half answer", "cut request", "refuse", "meanwhile"]
"""stall: take the request and never answer. cut answer: close the connection in the middle of the answer's body. half
answer: half of the body, under a header that calls it all. cut request: close it in the middle of the request's body.
refuse: close it before anything is answered. meanwhile: do something else first, and pass it on whole."""
STALLED_S = 600


@dataclass
class Fault:
    """What is done to the requests that it fits."""

    kind: Kind
    method: str
    part: str
    """Of the request's target."""
    left: int = 10**9
    """How many more of them."""
    act: Callable[[], object] = bool
    """What is done meanwhile."""

    def takes(self, method: str, target: str) -> bool:
        """Whether it spoils this request; counts it."""
        if not (self.left and method == self.method and self.part in target):
            return False
        self.left -= 1
        return True


class Proxy:
    """Listens on the loopback device and passes every request on, each over a connection of its own."""

    def __init__(self, port: int) -> None:
        """In front of the server at that port."""
        self.faults: list[Fault] = []
        self.spoiled: list[tuple[str, str]] = []
        """Method and kind of what was done, in order."""
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._listener.close()
        for connection in tuple(self._open):
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.add(client)
        with client, ending(client), contextlib.suppress(OSError):
            head, begun = read_head(client)
            method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
            fault = next((fault for fault in self.faults if fault.takes(method, target)), None)
            if fault is not None:
                self.spoiled.append((method, fault.kind))
            if fault is None:
                self._pass_on(client, head, begun)
            elif fault.kind == "meanwhile":
                fault.act()
                self._pass_on(client, head, begun)
            elif fault.kind == "stall":
                self._closed.wait(STALLED_S)
            elif fault.kind == "cut request":
                self._pass_on(client, head, begun, most=int(header(head, b"content-length") or 0) // 2)
            elif fault.kind != "refuse":
                self._pass_on(client, head, begun, spoil=cut if fault.kind == "cut answer" else halve)
        self._open.discard(client)

    def _pass_on(
        self, client: socket.socket, head: bytes, begun: bytes, most: int | None = None,
        spoil: Callable[[bytes], bytes] | None = None,
    ) -> None:  # fmt: skip
        """One request and its answer; at most so many bytes of the request's body, and then no answer."""
        if header(head, b"expect"):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        with socket.create_connection(("127.0.0.1", self._server_port)) as server, ending(server):
            server.sendall(without(head, b"expect", b"connection") + b"connection: close\r\n\r\n")
            if most is not None:
                for chunk in body(client, begun, most):
                    server.sendall(chunk)
                time.sleep(0.05)  # so that the server has seen it when the connection ends
                return
            threading.Thread(target=pump, args=(client, server, begun), daemon=True).start()
            if spoil is None:
                while chunk := server.recv(1 << 16):
                    client.sendall(chunk)
            else:
                client.sendall(spoil(b"".join(iter(lambda: server.recv(1 << 16), b""))))


@contextlib.contextmanager
def ending(connection: socket.socket) -> Iterator[None]:
    """Ends a connection after the block; closing alone would leave it open to a thread that still reads from it."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def pump(source: socket.socket, sink: socket.socket, begun: bytes) -> None:
    """All that comes from one to the other; a client sends no second request before it has its answer."""
    with contextlib.suppress(OSError):
        sink.sendall(begun)
        while chunk := source.recv(1 << 16):
            sink.sendall(chunk)


def body(client: socket.socket, begun: bytes, most: int) -> Iterator[bytes]:
    """The first bytes of a request's body."""
    chunk = begun[:most]
    while chunk:
        yield chunk
        most -= len(chunk)
        chunk = client.recv(min(most, 1 << 16)) if most else b""


def read_head(connection: socket.socket) -> tuple[bytes, bytes]:
    """A message's first lines without the empty one, and what came of its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(1 << 16)
        if not chunk:
            raise ConnectionResetError
        data += chunk
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n", rest


def header(head: bytes, name: bytes) -> bytes:
    """A header's value, empty if there is none."""
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return b""


def without(head: bytes, *names: bytes) -> bytes:
    """The first lines without some headers."""
    lines = [line for line in head.split(b"\r\n") if line.partition(b":")[0].strip().lower() not in names]
    return b"\r\n".join(lines)


def cut(answer: bytes) -> bytes:
    """All of an answer's head and half of its body; half of its head if it has no body."""
    head, _, whole = answer.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n" + whole[: len(whole) // 2] if whole else answer[: len(answer) // 2]


def halve(answer: bytes) -> bytes:
    """The same, but the head calls it all."""
    head, _, whole = answer.partition(b"\r\n\r\n")
    half = whole[: len(whole) // 2]
    return without(head, b"content-length") + b"\r\ncontent-length: %d\r\n\r\n" % len(half) + half
