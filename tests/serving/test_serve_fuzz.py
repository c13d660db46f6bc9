"""Whatever is sent: an answer as the API's own description declares it, errors in OpenAI's shape, no fault of ours."""

import json
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, reject, settings, strategies

from tests.endpoint import BASE, serving
from tests.ports import free_port

SMALL = {
    "limits": {"max_steps": 2, "max_pixels": 64 * 64, "max_n": 2, "max_upload_bytes": 2**20},
    "bases": [{"name": "tiny", "source": BASE, "slots": 4, "max_rank": 8, "steps": 1}],
}
"""So that what is taken is drawn at once."""
DRAW = {"prompt": "a red circle", "seed": 1}


@pytest.fixture(scope="module")
def small(ray_cluster: None, shelf: Path) -> Iterator[str]:
    with serving(shelf, free_port(), **SMALL) as url:
        yield url


def picture(url: str) -> str:
    answer = httpx.post(f"{url}/v1/images/generations", json=DRAW, headers={"x-request-id": "same"}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]["b64_json"]


def assert_openai_s(status: int, content: str, kind: str) -> None:
    assert 400 <= status < 500 and kind == "application/json", (status, kind, content[:300])
    error = json.loads(content)["error"]
    assert sorted(error) == ["code", "message", "param", "type"] and error["message"]


def fuzz(url: str, examples: int, seconds: float = math.inf) -> dict[str, set[int]]:
    """Statuses by route of so many requests to each that its description makes, valid and not."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found: dict[str, set[int]] = {}
    operations = [one.ok() for one in schema.get_all_operations()]
    for operation in operations:
        seen, end = found.setdefault(operation.path, set()), time.monotonic() + seconds / len(operations)
        modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
        for mode in modes:
            send = sender(operation.as_strategy(generation_mode=mode), url, examples, end, seen)
            try:
                send()
            except Exception as error:
                # Of GET without parameters there is nothing that is not valid.
                if mode is modes[0] or "Impossible" not in str(error) and "nsatisfiable" not in type(error).__name__:
                    raise
    return found


@strategies.composite
def made(draw: Any, cases: Any) -> Any:
    """Cases that schemathesis can make: of a file it sometimes tries a negation that it has no generator for."""
    try:
        return draw(cases)
    except ValueError as error:
        if "Unsupported type: 'Binary'" not in str(error):
            raise
        reject()


def sender(cases: Any, url: str, examples: int, end: float, seen: set[int]) -> Any:
    """Sends cases until `end`, and looks at what is answered."""

    @given(case=made(cases))
    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def send(case: Any) -> None:
        if time.monotonic() > end:
            return
        answer = case.call(base_url=url, timeout=60)
        seen.add(answer.status_code)
        kind = answer.headers.get("content-type", [""])[0].partition(";")[0]
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        if answer.status_code >= 400:
            assert_openai_s(answer.status_code, answer.text, kind)
        else:
            declared = case.operation.definition.raw["responses"]["200"]["content"]
            assert kind in declared, (case.as_curl_command(), kind)

    return send


ROUTES = {
    "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/{identity}", "/v1/adapters/{name}",
    "/v1/registry/refresh", "/v1/images/generations", "/v1/images/edits",
}  # fmt: skip


def test_its_own_description_finds_no_fault_in_it(small: str) -> None:
    before = picture(small)
    found = fuzz(small, 40)
    assert set(found) == ROUTES and all(found.values())
    assert 400 in found["/v1/images/generations"] and 400 in found["/v1/images/edits"]
    assert picture(small) == before


@pytest.mark.soak
def test_its_own_description_finds_no_fault_in_it_for_long(small: str) -> None:
    before = picture(small)
    found = fuzz(small, 2000, 900)
    assert set(found) == ROUTES and {200, 400} <= found["/v1/images/generations"]
    assert picture(small) == before


def speak(url: str, data: bytes, wait: float = 20, half: bool = False) -> bytes:
    """What is answered to raw bytes."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=wait) as wire:
        wire.sendall(data)
        if half:
            wire.shutdown(socket.SHUT_WR)
        try:
            return wire.recv(65536)
        except (TimeoutError, ConnectionResetError):
            return b""


def head(length: object, kind: str = "application/json", path: str = "/v1/images/generations", more: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}\r\n"
    ).encode()


def test_broken_connections_leave_it_as_it_was(small: str) -> None:
    before, text = picture(small), json.dumps(DRAW).encode()
    host = urlsplit(small)
    for _ in range(20):  # half a body, then gone; and a whole one whose picture nobody waits for
        for data in (head(1000) + text, head(len(text)) + text, head(500, "multipart/form-data; boundary=x") + b"--x"):
            with socket.create_connection((host.hostname, host.port)) as wire:
                wire.sendall(data)
    chunked = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    chunked += b"Content-Type: application/json\r\n\r\nzz\r\n\x00\xff garbage\r\n"
    for data in (chunked, b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", head(-1), head("many"), b"POST / HTTP/9.9\r\n\r\n"):
        answer = speak(small, data, 5, half=True)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), (data, answer)
    many = "".join(f"X-{i}: {'a' * 20}\r\n" for i in range(1000))
    answer = speak(small, head(len(text), more=many) + text, 30)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 4")), answer[:200]
    assert picture(small) == before


WRONG: dict[str, tuple[str, str, bytes, int]] = {
    "no JSON": ("generations", "application/json", b"{", 400),
    "no UTF-8": ("generations", "application/json", b"\xff\xfe", 400),
    "nested": ("generations", "application/json", b"[" * 100_000, 400),
    "another kind": ("generations", "text/plain", b"{}", 400),
    "a form for JSON": ("generations", "multipart/form-data; boundary=x", b"--x--", 400),
    "JSON for a form": ("edits", "application/json", b"{}", 400),
    "no boundary": ("edits", "multipart/form-data", b"", 400),
    "a broken form": ("edits", "multipart/form-data; boundary=x", b"--x\r\nnonsense", 400),
    "too much JSON": ("generations", "application/json", b" " * (2**20 + 1), 413),
    "too large a file": (
        "edits", "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + b"a" * (2**20 + 1)
        + b"\r\n--x--\r\n", 413,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_bodies_are_refused_in_openai_s_shape(small: str, case: str) -> None:
    path, kind, body, status = WRONG[case]
    answer = httpx.post(f"{small}/v1/images/{path}", content=body, headers={"Content-Type": kind}, timeout=60)
    assert answer.status_code == status, answer.text
    assert_openai_s(answer.status_code, answer.text, answer.headers["content-type"])
