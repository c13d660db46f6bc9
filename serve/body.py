"""Bodies of requests: read up to a bound, then JSON or a form as values that are still to be checked."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message

from serve.errors import ApiError, invalid, timed_out, too_large, wrong_content_type

MAX_FIELDS = 100
"""Of a form, and of any object in JSON: what is said of an unknown one takes time for each."""
TEXT_BYTES = 2**20
"""Of a body without files: of JSON, or all text fields of a form together."""

_ARRAY = re.compile(r"adapters\[\](?:\[(name|scale)\])?")
_JSON = re.compile(r"application/([a-z0-9.-]+\+)?json\s*(;.*)?", re.IGNORECASE)
_FORM = re.compile(r"multipart/form-data\s*;.*", re.IGNORECASE)
_FOREIGN = re.compile(r"charset\s*=\s*(?!\"?utf-?8\b)", re.IGNORECASE)
"""The parser takes any codec that Python has, slow ones and ones that make no text among them."""


class Form(NamedTuple):
    """A form, not checked yet."""

    fields: list[tuple[str, str]]
    files: dict[str, bytes]


def in_time(request: Request, seconds: float) -> Request:
    """The same request, whose body raises `ApiError` (408) where it is not there after so long, all of it."""
    end = asyncio.get_running_loop().time() + seconds

    async def receive() -> Message:
        try:
            return await asyncio.wait_for(request.receive(), end - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            raise timed_out(seconds) from None

    return Request(request.scope, receive)


def bounded(request: Request, most: int) -> Request:
    """The same request, whose body raises `ApiError` (413) where it is longer than `most` bytes."""
    declared, read = request.headers.get("content-length", ""), 0
    if declared.isdecimal() and int(declared[:19]) > most:
        raise too_large(None, most)

    async def receive() -> Message:
        nonlocal read
        message = await request.receive()
        read += len(message.get("body", b""))
        if read > most:  # there was no length, or a false one
            raise too_large(None, most)
        return message

    return Request(request.scope, receive)


async def read_text(request: Request) -> bytes:
    """The body of a request with JSON.

    Raises:
        ApiError: 400 for another kind of body, 413 for one of more than `TEXT_BYTES`.
    """
    if not _JSON.fullmatch(request.headers.get("content-type", "")):
        raise wrong_content_type("application/json")
    return await bounded(request, TEXT_BYTES).body()


async def read_form(request: Request, files: Iterable[str], max_bytes: int) -> Form:
    """The fields of a request with a form, and its files.

    Args:
        request: The request.
        files: Names of the fields that are files; `NAME[]`, as OpenAI's client sends a list, is one of a single file.
        max_bytes: Of each file. A text field may have a third more, so that it can be a file in base64.

    Raises:
        ApiError: 400 for another kind of body, a file twice or in another field; 413 for more bytes.
    """
    kind = request.headers.get("content-type", "")
    if not _FORM.fullmatch(kind) or _FOREIGN.search(kind):
        raise wrong_content_type("multipart/form-data in UTF-8, with a boundary")
    names = list(files)
    text = max_bytes * 4 // 3 + TEXT_BYTES
    whole = bounded(request, len(names) * max_bytes * 4 // 3 + TEXT_BYTES)
    found = Form([], {})
    # One more file than there may be, so that the message can be ours.
    async with whole.form(max_files=len(names) + 1, max_fields=MAX_FIELDS, max_part_size=text) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                name = name.removesuffix("[]")
                if not value.filename and not value.size:
                    continue  # what a browser sends for a file that was not chosen
                if name not in names:
                    raise invalid(
                        name[:80], f"a file; files go into {', '.join(names[:-1])} and {names[-1]}", "unknown_parameter"
                    )
                if name in found.files:
                    raise invalid(name, "given twice; one file is taken", "invalid_value")
                if (value.size or 0) > max_bytes:
                    raise too_large(name, max_bytes)
                found.files[name] = await value.read()
            else:
                found.fields.append((name, value))
    return found


def read_json(body: bytes, field: str | None = None) -> Any:
    """The value of a JSON text: of the body, or of a form's field.

    Raises:
        ApiError: 400; it is none, gives a field twice or too many, or holds NaN or infinity.
    """
    try:
        return json.loads(body.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise _no_json(field, f"valid JSON: {error.msg} at character {error.pos}") from None
    except UnicodeDecodeError as error:
        raise _no_json(field, f"UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _no_json(field, "valid JSON: nested too deeply") from None
    except NoNumber as error:
        raise _no_json(field, f"valid JSON: {error} is no number") from None
    except ValueError:  # Python reads no number of more than 4300 digits
        raise _no_json(field, "valid JSON: a number has too many digits") from None


class NoNumber(Exception):
    """What stands for a number and is none."""


def _no_json(field: str | None, reason: str) -> ApiError:
    if field is None:
        return ApiError(400, f"the body is not {reason}")
    return invalid(field, f"not {reason}", "invalid_value")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if len(pairs) > MAX_FIELDS:
        raise ApiError(400, f"{len(pairs)} fields in one object: should be at most {MAX_FIELDS}")
    for name, value in pairs:
        if name in values:
            raise invalid(name[:80], "given twice", "invalid_value")
        values[name] = value
    return values


def _no_number(text: str) -> Any:
    raise NoNumber(text)


def read_fields(fields: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The values of a form's text fields; an empty one is as if it were left out.

    `adapters` is JSON or one name. Lists as OpenAI's client sends them are read too: `adapters[]` several times, or as
    many `adapters[][name]` as `adapters[][scale]`, in the same order.

    Raises:
        ApiError: 400; a field is given twice, or a list is not as above. 413; it is too long.
    """
    values: dict[str, Any] = {}
    lists: dict[str | None, list[str]] = {None: [], "name": [], "scale": []}
    for name, text in fields:
        if array := _ARRAY.fullmatch(name):
            lists[array[1]].append(text)
        elif name in values:
            raise invalid(name[:80], "given twice", "invalid_value")
        elif text:
            values[name] = text
    if len(lists["scale"]) not in (0, len(lists["name"])):
        counts = f"{len(lists['scale'])} scales for {len(lists['name'])} names"
        raise invalid("adapters", f"{counts}: should be one each, or none", "invalid_value")
    pairs = [{"name": name} for name in lists["name"]]
    for pair, scale in zip(pairs, lists["scale"], strict=False):
        pair["scale"] = scale
    listed = [*lists[None], *pairs]
    if listed and "adapters" in values:
        raise invalid("adapters", "given twice", "invalid_value")
    if listed:
        values["adapters"] = listed
    elif "adapters" in values:
        values["adapters"] = _listed(values["adapters"])
    return values


def _listed(text: str) -> Any:
    """A form's `adapters`: a JSON list or object, else a name."""
    if not text.lstrip().startswith(("[", "{")):
        return [text]
    if len(text) > TEXT_BYTES:  # a text field may be a picture, and so longer
        raise too_large("adapters", TEXT_BYTES)
    value = read_json(text.encode("utf-8", "surrogatepass"), "adapters")
    return [value] if isinstance(value, dict) else value
