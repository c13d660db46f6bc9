import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from serve.body import TEXT_BYTES, bounded, in_time, read_form, read_text
from serve.errors import install

MOST = 1000
WHOLE = 2 * MOST * 4 // 3 + TEXT_BYTES
"""Of a form with two files."""


def make_app() -> FastAPI:
    app = FastAPI()
    install(app)

    @app.post("/text")
    async def text(request: Request) -> int:
        return len(await read_text(request))

    @app.post("/bounded")
    async def bound(request: Request) -> int:
        return len(await bounded(request, MOST).body())

    @app.post("/soon")
    async def soon(request: Request) -> int:
        return len(await in_time(request, 1.0).body())

    @app.post("/v1/images/edits")
    async def form(request: Request) -> dict[str, Any]:
        found = await read_form(request, ["image", "mask"], MOST)
        return {"fields": found.fields, "files": {name: len(data) for name, data in found.files.items()}}

    return app


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(make_app(), raise_server_exceptions=False)


def told(answer: Any) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


def test_a_body_ends_at_its_bound(client: TestClient) -> None:
    assert client.post("/bounded", content=b"x" * MOST).json() == MOST
    over = (413, None, f"more than {MOST} bytes, which is the most")
    assert told(client.post("/bounded", content=b"x" * (MOST + 1))) == over
    for length in ("9" * 30, str(MOST + 1)):
        assert told(client.post("/bounded", content=b"x", headers={"content-length": length})) == over


def test_a_body_that_comes_too_slowly_is_given_up() -> None:
    async def chunks(pause: float) -> AsyncIterator[bytes]:
        for _ in range(100):  # each soon after the last, and the whole too late
            yield b"x"
            await asyncio.sleep(pause)

    async def post(pause: float) -> httpx2.Response:
        transport = httpx2.ASGITransport(app=make_app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post("/soon", content=chunks(pause))

    assert asyncio.run(post(0)).json() == 100
    assert told(asyncio.run(post(0.05))) == (408, None, "not done within 1 seconds")


def test_a_body_without_a_length_is_not_read_to_its_end() -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 100
            yield b"x" * 100

    async def post() -> Any:
        transport = httpx2.ASGITransport(make_app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://gtl") as client:
            return await client.post("/bounded", content=chunks())

    assert told(asyncio.run(post())) == (413, None, f"more than {MOST} bytes, which is the most")
    assert sent == MOST + 100


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON", 200),
        ("application/problem+json", 200),
        ("text/plain", 400),
        ("application/jsonp", 400),
        ("", 400),
    ],
)
def test_json_is_told_by_its_type(client: TestClient, kind: str, status: int) -> None:
    answer = client.post("/text", content=b"{}", headers={"content-type": kind})
    assert answer.status_code == status
    if status == 400:
        assert told(answer) == (400, None, "Content-Type: expected application/json")


def test_text_is_bounded(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    assert client.post("/text", content=b" " * TEXT_BYTES, headers=headers).json() == TEXT_BYTES
    assert client.post("/text", content=b" " * (TEXT_BYTES + 1), headers=headers).status_code == 413


def edit(client: TestClient, files: list[tuple[str, bytes]], fields: dict[str, Any] | None = None) -> Any:
    named = [(name, ("a.png", data, "image/png")) for name, data in files]
    return client.post("/v1/images/edits", files=named, data=fields)


def test_a_form_has_fields_and_files(client: TestClient) -> None:
    answer = edit(client, [("image", b"x" * MOST), ("mask", b"y")], {"prompt": "a dög", "adapters[]": ["a", "b"]})
    assert answer.json() == {
        "fields": [["prompt", "a dög"], ["adapters[]", "a"], ["adapters[]", "b"]], "files": {"image": MOST, "mask": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("files", "status", "param", "message"),
    [
        ([("image", b"x" * (MOST + 1))], 413, "image", f"image: more than {MOST} bytes, which is the most"),
        ([("image", b"x"), ("image", b"y")], 400, "image", "image: given twice; one file is taken"),
        ([("image[]", b"x"), ("image[]", b"y")], 400, "image", "image: given twice; one file is taken"),
        ([("prompt", b"x")], 400, "prompt", "prompt: a file; files go into image and mask"),
        ([("image", b"x")] * 4, 400, None, "Too many files. Maximum number of files is 3."),
        ([("image", b"x" * WHOLE)], 413, None, f"more than {WHOLE} bytes"),
    ],
)
def test_files_are_bounded(
    client: TestClient, files: list[tuple[str, bytes]], status: int, param: str | None, message: str
) -> None:
    found = told(edit(client, files))
    assert found[:2] == (status, param)
    assert found[2].startswith(message)


def test_fields_are_bounded(client: TestClient) -> None:
    long = MOST * 4 // 3 + TEXT_BYTES
    status, _, message = told(edit(client, [("image", b"x")], {"prompt": "x" * (long + 1)}))
    assert (status, message) == (400, "Part exceeded maximum size of 1025KB.")
    assert len(edit(client, [("image", b"x")], {"prompt": "x" * long}).json()["fields"][0][1]) == long
    status, _, message = told(edit(client, [("image", b"x")], {f"f{i}": "x" for i in range(101)}))
    assert (status, message) == (400, "Too many fields. Maximum number of fields is 100.")


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "multipart/form-data; boundary=x; charset=punycode",
        'multipart/form-data; boundary=x; charset="unicode_escape"',
    ],
)
def test_a_form_of_another_kind_is_refused(client: TestClient, kind: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    answer = client.post("/v1/images/edits", content=body, headers={"content-type": kind})
    assert told(answer) == (400, None, "Content-Type: expected multipart/form-data in UTF-8, with a boundary")
    good = client.post(
        "/v1/images/edits", content=body, headers={"content-type": "multipart/form-data; boundary=x; charset=UTF-8"}
    )
    assert good.json() == {"fields": [["prompt", "a"]], "files": {}}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data; nothing=x", b""),
        ("multipart/form-data; boundary=x", b"--y\r\nnothing"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n"),
        ("multipart/form-data; boundary=" + "x" * 300, b"--x"),
    ],
)
def test_a_broken_form_is_refused(client: TestClient, kind: str, body: bytes) -> None:
    status, _, message = told(client.post("/v1/images/edits", content=body, headers={"content-type": kind}))
    assert status == 400
    assert len(message) > 10


def test_a_client_that_leaves_while_it_sends_is_no_fault() -> None:
    answers: list[dict[str, Any]] = []

    async def left() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/text", "query_string": b"", "http_version": "1.1", "scheme": "http",
        "headers": [(b"content-type", b"application/json")], "server": ("gtl", 80), "client": ("a", 1),
    }  # fmt: skip
    app: Callable[..., Awaitable[None]] = make_app()
    asyncio.run(app(scope, left, send))  # type: ignore[arg-type]
    assert answers[0]["status"] == 499


@pytest.mark.parametrize("listed", [False, True])
def test_openais_client_sends_such_forms(listed: bool) -> None:
    async def call() -> Any:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(make_app()))
        async with openai.AsyncOpenAI(api_key="x", base_url="http://gtl/v1", max_retries=0, http_client=http) as client:
            return await client.images.with_raw_response.edit(
                image=[b"abc"] if listed else b"abc", mask=b"de", prompt="a dog", n=2, stream=False,
                extra_body={"strength": 0.5, "adapters": [{"name": "a", "scale": 2}, {"name": "b", "scale": 3}]},
            )  # fmt: skip

    assert asyncio.run(call()).http_response.json() == {
        "fields": [
            ["prompt", "a dog"], ["n", "2"], ["stream", "false"], ["strength", "0.5"], ["adapters[][name]", "a"],
            ["adapters[][name]", "b"], ["adapters[][scale]", "2"], ["adapters[][scale]", "3"],
        ],
        "files": {"image": 3, "mask": 2},
    }  # fmt: skip
