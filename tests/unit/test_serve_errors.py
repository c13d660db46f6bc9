import asyncio
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx2
import openai
import pytest
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from ray.exceptions import RayTaskError

from gtl.types import UserError
from serve.errors import (
    ApiError,
    api_error,
    from_user_error,
    install,
    invalid,
    model_not_found,
    overloaded,
    rate_limited,
    request_id,
    sse_error,
    timed_out,
    too_large,
    unauthorized,
)
from serve.schema import Generation

RAISED: dict[str, Exception] = {
    "invalid": invalid("size", "'7': should be a multiple of 8"),
    "unauthorized": unauthorized("no key"),
    "model": model_not_found("sd:dgo", ["sd:dog", "sd:dogs", "sd:cat"]),
    "rate": rate_limited(2.1, 60),
    "overloaded": overloaded(0.2),
    "timeout": timed_out(300),
    "large": too_large("image", 100),
    "user": UserError("steps: 0: expected 1 to 999"),
    "inside": UserError("s3://secret/registry: cannot be read"),
    "bug": RuntimeError("no such file: /home/secret/model.safetensors"),
    "unavailable": HTTPException(503, "/home/secret is full"),
    "replica": RayTaskError("f", "Traceback: /home/secret/generator.py", overloaded(7)).as_instanceof_cause(),
    "replica user": RayTaskError("f", "Traceback: /home/secret", UserError("width: 7: too odd")).as_instanceof_cause(),
    "replica bug": RayTaskError("f", "Traceback: /home/secret", KeyError("/home/secret")).as_instanceof_cause(),
}


def make_app() -> FastAPI:
    app = FastAPI()
    install(app)

    @app.get("/raise")
    async def raise_it(name: str) -> None:
        raise RAISED[name]

    @app.get("/depends")
    async def depends(count: Annotated[int, Query(ge=1)]) -> int:
        return count

    @app.get("/identity")
    async def identity(request: Request) -> list[str]:
        return [request_id(request), request_id(request)]

    @app.post("/v1/images/generations", response_model=None)
    async def generations(request: Request, asked: Generation) -> StreamingResponse | JSONResponse:
        async def events() -> AsyncIterator[bytes]:
            yield sse_error(api_error(RAISED[asked.prompt], "r1"))

        if asked.stream:
            return StreamingResponse(events(), media_type="text/event-stream")
        raise RAISED[asked.prompt]

    return app


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(make_app(), raise_server_exceptions=False)


def error(answer: Any) -> tuple[int, dict[str, Any]]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.headers["x-request-id"]) == 32
    return answer.status_code, body["error"]


@pytest.mark.parametrize(
    ("name", "status", "param", "code", "message"),
    [
        ("invalid", 400, "size", None, "size: '7': should be a multiple of 8"),
        ("unauthorized", 401, None, "invalid_api_key", "no key"),
        ("model", 404, "model", "model_not_found", "model: 'sd:dgo': not served here; did you mean sd:dog or sd:dogs?"),
        ("timeout", 408, None, "timeout", "not done within 300 seconds"),
        ("large", 413, "image", "request_too_large", "image: more than 100 bytes, which is the most"),
        ("rate", 429, None, "rate_limit_exceeded", "more than 60 requests a minute with this key; try again in 3 s"),
        ("overloaded", 429, None, "overloaded", "too many requests wait; try again in 1 s"),
        ("user", 400, "num_inference_steps", "invalid_value", "num_inference_steps: 0: expected 1 to 999"),
        ("replica", 429, None, "overloaded", "too many requests wait; try again in 7 s"),
        ("replica user", 400, "size", "invalid_value", "size: width: 7: too odd"),
    ],
)
def test_what_is_raised_is_told(
    client: TestClient, name: str, status: int, param: str | None, code: str | None, message: str
) -> None:
    answer = client.get("/raise", params={"name": name})
    kind = {408: "timeout_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    assert error(answer) == (status, {"message": message, "type": kind, "param": param, "code": code})
    waits = {"rate": "3", "overloaded": "1", "replica": "7"}
    assert answer.headers.get("retry-after") == waits.get(name)
    assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)


@pytest.mark.parametrize(
    ("name", "status"), [("bug", 500), ("inside", 500), ("replica bug", 500), ("unavailable", 503)]
)
def test_nothing_of_the_inside_is_told(
    client: TestClient, caplog: pytest.LogCaptureFixture, name: str, status: int
) -> None:
    with caplog.at_level(logging.ERROR, "serve.errors"):
        answer = client.get("/raise", params={"name": name})
    identity = answer.headers["x-request-id"]
    assert error(answer) == (status, {
        "message": f"internal error; request {identity}", "type": "server_error", "param": None,
        "code": "internal_error",
    })  # fmt: skip
    assert "secret" not in answer.text + str(answer.headers)
    assert identity in caplog.text
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "status", "param", "code", "message"),
    [
        ({"content": b'{"prompt": '}, 400, None, None, "the body is not valid JSON: Expecting value at character 11"),
        ({"content": b""}, 400, None, None, "the body is missing"),
        ({"content": b"[]"}, 400, None, None, "the body should be a JSON object with fields"),
        ({"content": b"{}"}, 400, "prompt", "missing_required_parameter", "prompt: missing"),
        ({"json": {"prompt": "x", "nn": 1}}, 400, "nn", "unknown_parameter", "nn: unknown field"),
        ({"json": {"prompt": "x", "n": "2"}}, 400, "n", "invalid_value", "n: '2': should be a whole number"),
        ({"json": {"prompt": "x", "n": 2, "stream": True}}, 400, "stream", "invalid_value",
         "stream: true: should be left out with n=2; only one picture can be streamed"),
        ({"content": b'{"prompt": "x"}', "headers": {"content-type": "text/plain"}}, 400, None,
         "unsupported_content_type", "Content-Type: expected application/json"),
    ],
)  # fmt: skip
def test_a_body_that_the_framework_refuses(
    client: TestClient, arguments: dict[str, Any], status: int, param: str | None, code: str | None, message: str
) -> None:
    headers = arguments.pop("headers", {"content-type": "application/json"})
    answer = client.post("/v1/images/generations", headers=headers, **arguments)
    told = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    assert error(answer) == (status, told)


def test_the_routers_own_errors(client: TestClient) -> None:
    status, told = error(client.get("/v1/nothing"))
    assert (status, told["message"], told["code"]) == (404, "GET /v1/nothing: no such path", "unknown_url")
    answer = client.put("/v1/images/generations")
    status, told = error(answer)
    assert (status, told["code"], answer.headers["allow"]) == (405, "method_not_supported", "POST")
    assert told["message"] == "PUT /v1/images/generations: not a method of this path"
    status, told = error(client.get("/depends", params={"count": "0"}))
    assert (status, told["param"]) == (400, "count")
    assert told["message"] == "count: '0': should be greater than or equal to 1"


def test_a_request_keeps_its_id(client: TestClient) -> None:
    assert client.get("/identity", headers={"x-request-id": "a-1.b_c"}).json() == ["a-1.b_c", "a-1.b_c"]
    for odd in ("", "x" * 129, "a b", "a\tb", "a<b"):
        first, second = client.get("/identity", headers={"x-request-id": odd}).json()
        assert first == second != odd
        assert len(first) == 32


def test_an_answer_tells_the_id_that_the_request_did_not_bring(client: TestClient) -> None:
    """What it brought is from Ray Serve's proxy, which puts it onto the answer itself."""
    for name in ("invalid", "bug"):
        told = [
            client.get("/raise", params={"name": name}, headers={"x-request-id": given}).headers.get("x-request-id", "")
            for given in ("a-1", "a b")
        ]
        assert [len(one) for one in told] == [0, 32]


def test_an_error_travels_between_processes() -> None:
    told = ApiError(429, "later", "t", "c", "p", {"Retry-After": "3"})
    copy = pickle.loads(pickle.dumps(told))
    assert (copy.status_code, copy.headers, copy.body()) == (429, {"Retry-After": "3"}, told.body())


def test_a_message_is_one_line_of_bounded_length_that_can_be_sent() -> None:
    told = ApiError(400, "a\nb \ud800 " + "x" * 9999, param="p\ud800")
    assert told.message.startswith("a b \\ud800 xxx")
    assert len(told.message) == 503
    json.dumps(told.body(), ensure_ascii=False).encode()


def test_only_a_mistake_in_a_field_of_the_request_is_the_clients() -> None:
    assert from_user_error(UserError("/srv/registry: cannot be read")) is None
    assert from_user_error(UserError("adapter 'x': not in the registry /srv/registry; adapters there: none")) is None
    told = from_user_error(UserError("height: 100: expected a multiple of 8, such as 96 or 104"))
    assert told is not None
    assert (told.param, told.message) == ("size", "size: height: 100: expected a multiple of 8, such as 96 or 104")


def test_near_names_are_proposed() -> None:
    assert model_not_found("x" * 999).message == (
        f"model: '{'x' * 79}...: not served here; GET /v1/models lists what there is"
    )
    many = [f"tiny:adapter-{i}" for i in range(2000)]
    assert "did you mean tiny:adapter-7 or" in model_not_found("tiny:adaptr-7", many).message
    assert "lists what there is" in model_not_found("cat", [*many, "cat"]).message, "a bounded number is looked through"
    assert model_not_found("dog@prd", ["dog@prod"], "adapters").body()["error"]["param"] == "adapters"


def ask(prompt: str, **arguments: Any) -> Any:
    """What OpenAI's client makes of an answer."""

    async def call() -> Any:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(make_app(), raise_app_exceptions=False))
        async with openai.AsyncOpenAI(api_key="x", base_url="http://gtl/v1", max_retries=0, http_client=http) as client:
            answer = await client.images.generate(prompt=prompt, model="sd", **arguments)
            return [event async for event in answer] if arguments.get("stream") else answer

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("name", "kind", "param", "code"),
    [
        ("invalid", openai.BadRequestError, "size", None),
        ("unauthorized", openai.AuthenticationError, None, "invalid_api_key"),
        ("model", openai.NotFoundError, "model", "model_not_found"),
        ("overloaded", openai.RateLimitError, None, "overloaded"),
        ("bug", openai.InternalServerError, None, "internal_error"),
    ],
)
def test_openais_client_raises_its_own_kind(
    name: str, kind: type[openai.APIStatusError], param: str | None, code: str | None
) -> None:
    with pytest.raises(kind) as caught:
        ask(name)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]


def test_openais_client_raises_what_ends_a_stream() -> None:
    with pytest.raises(openai.APIError, match="too many requests wait") as caught:
        ask("overloaded", stream=True)
    assert caught.value.code == "overloaded"


LIGHT = """
import json, sys
import serve.body, serve.errors, serve.keys, serve.schema, serve.share, serve.uploads
print(json.dumps(sorted({"torch", "ray", "diffusers", "transformers", "peft", "numpy", "pyarrow"} & set(sys.modules))))
"""


def test_the_edges_of_the_api_load_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == []
