"""OpenAI's error object for all that can go wrong. It says what the client can mend and nothing of the inside."""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from gtl.config.explain import LONGEST, WORDINGS
from gtl.types import UserError

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
MAX_MESSAGE = 500
"""Characters of a message; what a client sent is quoted in it."""
COMPARED = 1000
"""Names that a wrong one is compared with."""
CODES = {
    401: "invalid_api_key", 404: "not_found", 405: "method_not_supported", 408: "timeout", 413: "request_too_large",
    429: "rate_limit_exceeded",
}  # fmt: skip
"""By status, where the error itself names none."""
FIELDS = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed", "strength": "strength",
    "steps": "num_inference_steps", "guidance": "guidance_scale", "height": "size", "width": "size",
    "image": "image", "mask": "mask", "adapters": "adapters", "image_guidance": "image_guidance_scale",
    "invert": "invert",
}  # fmt: skip
"""What the engine's messages begin with, and the field of the API that is meant."""

_TEXT = {"type": "string"}
_ERROR = {
    "message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
}  # fmt: skip
RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "An error, in OpenAI's shape.",
        "content": {"application/json": {"schema": {
            "type": "object", "required": ["error"],
            "properties": {"error": {"type": "object", "required": list(_ERROR), "properties": _ERROR}},
        }}},
    }
}  # fmt: skip
"""Of every route, in the API's own description."""

_PLACES = ("body", "query", "path", "header", "cookie")
_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class ApiError(HTTPException):
    """A request that is answered with an error.

    It is an HTTPException because FastAPI lets no other through while it reads a body. It can be pickled, and so raised
    by a replica.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`param` is the field of the request that is meant; `headers` go into the answer."""
        super().__init__(status, clean(message), dict(headers or {}))
        self.type, self.code, self.param = type, code, param and clean(param)

    @property
    def message(self) -> str:
        """What went wrong, in one line."""
        return self.detail

    def __reduce__(self) -> tuple[Any, ...]:
        return ApiError, (self.status_code, self.detail, self.type, self.code, self.param, self.headers)

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer, or of an `error` event."""
        return {"error": {"message": self.detail, "type": self.type, "param": self.param, "code": self.code}}


def clean(text: str) -> str:
    """One line of bounded length that can be sent as UTF-8, whatever the client put into what is quoted."""
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."


def quote(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def invalid(field: str, reason: str, code: str | None = None) -> ApiError:
    """400: a field that is not as it should be."""
    return ApiError(400, f"{field}: {reason}", code=code, param=field)


def unauthorized(message: str) -> ApiError:
    """401: no key, or none that is known."""
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def model_not_found(name: str, known: Iterable[str] = (), field: str = "model") -> ApiError:
    """404: a base, adapter, version or alias that is not served; `field` is `model` or `adapters`."""
    near = difflib.get_close_matches(name, list(islice(known, COMPARED)), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "GET /v1/models lists what there is"
    return ApiError(404, f"{field}: {quote(name)}: not served here; {hint}", code="model_not_found", param=field)


def too_large(field: str | None, most: int) -> ApiError:
    """413: more bytes than are read."""
    where = f"{field}: " if field else ""
    return ApiError(413, f"{where}more than {most} bytes, which is the most", code="request_too_large", param=field)


def timed_out(seconds: float) -> ApiError:
    """408: not done in time, and given up."""
    return ApiError(408, f"not done within {seconds:g} seconds", type="timeout_error", code="timeout")


def key_reused() -> ApiError:
    """422: the key of another request, as draft-ietf-httpapi-idempotency-key-header answers it."""
    message = "Idempotency-Key: was sent with another request; a new request needs a new key"
    return ApiError(422, message, code="idempotency_key_reused")


def moderation_blocked() -> ApiError:
    """400: a picture was drawn and is kept back, as OpenAI answers it."""
    message = "the picture was kept back by this server's safety check; another prompt or seed may pass"
    return ApiError(400, message, type="image_generation_user_error", code="moderation_blocked")


def rate_limited(retry_after: float, per_minute: float, ingresses: int = 1) -> ApiError:
    """429: this key has asked too often, of one of so many ingresses."""
    share = "" if ingresses == 1 else f" at this one of {ingresses} ingresses"
    message = f"more than {per_minute:g} requests a minute with this key{share}; try again in {_seconds(retry_after)} s"
    return _later(message, "rate_limit_exceeded", retry_after)


def overloaded(retry_after: float) -> ApiError:
    """429: too many requests wait already."""
    return _later(f"too many requests wait; try again in {_seconds(retry_after)} s", "overloaded", retry_after)


def _later(message: str, code: str, retry_after: float) -> ApiError:
    headers = {"Retry-After": str(_seconds(retry_after))}
    return ApiError(429, message, type="rate_limit_error", code=code, headers=headers)


def _seconds(wait: float) -> int:
    return max(1, math.ceil(wait))


def internal(request_id: str, status: int = 500) -> ApiError:
    """500: a fault of ours. The log has the rest under the request's id."""
    return ApiError(status, f"internal error; request {request_id}", type="server_error", code="internal_error")


def from_mistakes(mistakes: Sequence[Mapping[str, Any]], fields: Iterable[str] = ()) -> ApiError:
    """400 for the first of pydantic's mistakes. An unknown field comes first: it explains missing ones.

    Args:
        mistakes: What `ValidationError.errors()` or `RequestValidationError.errors()` returns.
        fields: Names that an unknown field may have been meant as.
    """
    first = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    path = first["loc"][1:] if first["loc"][:1] and first["loc"][0] in _PLACES else first["loc"]
    kind, found, given = ".".join(map(str, path)), first.get("input"), dict(first.get("ctx", {}))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {given.get('error')} at character {path[-1]}")
    if not path and isinstance(found, bytes | bytearray):
        return wrong_content_type("application/json")
    if not path and first["type"] == "missing":
        return ApiError(400, "the body is missing")
    if not path and first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return ApiError(400, "the body should be a JSON object with fields")
    if first["type"] == "extra_forbidden":
        return _unknown_field(kind[:LONGEST], fields if len(path) == 1 else ())
    if first["type"] == "missing":
        return ApiError(400, f"{kind}: missing", code="missing_required_parameter", param=kind)
    words = _wording(first, given)
    if not path:  # of several fields together: begins with the one that is meant
        field = words.partition(":")[0]
        return ApiError(400, words, code="invalid_value", param=field if field.isidentifier() else None)
    return ApiError(400, f"{kind}: {quote(found)}: {words}", code="invalid_value", param=kind)


def _unknown_field(name: str, fields: Iterable[str]) -> ApiError:
    known = list(fields)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; fields: {', '.join(known)}" if known else ""
    return ApiError(400, f"{name}: unknown field{hint}", code="unknown_parameter", param=name)


def _wording(mistake: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    if mistake["type"] in ("model_type", "model_attributes_type"):
        return "should be an object with fields"
    if mistake["type"] in WORDINGS:
        return WORDINGS[mistake["type"]].format(**given)
    words = mistake["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return words[:1].lower() + words[1:]


def wrong_content_type(expected: str) -> ApiError:
    """400: a body of another kind, as OpenAI answers it."""
    return ApiError(400, f"Content-Type: expected {expected}", code="unsupported_content_type")


def from_user_error(error: UserError) -> ApiError | None:
    """400 for a mistake in a field of the request; None for any other, whose text may name files and buckets."""
    text = str(error)
    name, _, rest = text.partition(":")
    field = FIELDS.get(name)
    if field is None:
        return None
    return invalid(field, text if field == "size" else rest.strip(), code="invalid_value")


def api_error(error: BaseException, request_id: str) -> ApiError:
    """What the client is told of any exception; what becomes an internal error is logged under the request's id."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause  # Ray raises a replica's error inside one of its own, whose text is a traceback
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return from_mistakes(error.errors())
    if isinstance(error, HTTPException) and error.status_code < 500:
        return ApiError(error.status_code, error.detail, code=CODES.get(error.status_code), headers=error.headers)
    if isinstance(error, UserError) and (found := from_user_error(error)):
        return found
    log.error("request %s: internal error", request_id, exc_info=error)
    return internal(request_id, error.status_code if isinstance(error, HTTPException) else 500)


def sse_error(error: ApiError) -> bytes:
    """A server-sent event that ends a stream: its status has been sent long ago."""
    return b"event: error\ndata: " + json.dumps(error.body()).encode() + b"\n\n"


def request_id(request: Request) -> str:
    """The request's id, the same whenever it is asked: its header `x-request-id` if that is a plain one, else new."""
    known: str | None = getattr(request.state, "request_id", None)
    if known is None:
        given = request.headers.get("x-request-id", "")
        known = given if _PLAIN_ID.fullmatch(given) else uuid.uuid4().hex
        request.state.request_id = known
    return known


def id_headers(request: Request) -> dict[str, str]:
    """The header that tells a request's id; none where the request came with it.

    Ray Serve's proxy gives every request one and puts it onto the answer itself; of two, clients would read "ID, ID".
    """
    identity = request_id(request)
    return {} if request.headers.get("x-request-id") == identity else {"x-request-id": identity}


def install(app: FastAPI) -> None:
    """Let an application answer every error in OpenAI's shape, those of its routes and of its framework alike."""
    for kind in (HTTPException, RequestValidationError, UserError, Exception):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientDisconnect, _nobody_listens)


async def _answer(request: Request, error: Exception) -> Response:
    identity = request_id(request)
    told = api_error(error, identity)
    if told.param is None and not isinstance(error, ApiError):
        told = _of_route(told, request)
    headers = {**(told.headers or {}), **id_headers(request)}
    return JSONResponse(told.body(), told.status_code, headers)


def _of_route(error: ApiError, request: Request) -> ApiError:
    """The router's own two errors, with what was asked for."""
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 404 and error.message == "Not Found":
        return ApiError(404, f"{asked}: no such path", code="unknown_url")
    if error.status_code == 405 and error.message == "Method Not Allowed":
        return ApiError(405, f"{asked}: not a method of this path", code=error.code, headers=error.headers)
    return error


async def _nobody_listens(request: Request, error: Exception) -> Response:
    """For a client that left while it was still sending; the status is nginx's for the log."""
    return Response(status_code=499)
