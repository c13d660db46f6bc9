"""The deployment that answers HTTP: checks a request, settles what it means, and lets generators draw it."""

import asyncio
import base64
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, Metric
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from gtl.generate.edit import IMAGE_GUIDANCE
from gtl.storage import Store
from serve import errors, metrics, replay
from serve.body import in_time, read_text
from serve.catalog import Catalog, Chosen
from serve.keys import KeyFile, share_out
from serve.links import link
from serve.order import Drawn, Order, Stopped, until
from serve.peers import Together, ask_all
from serve.ready import missing
from serve.schema import (
    Completed,
    Drawing,
    Edit,
    Generation,
    ImagesResponse,
    ModelList,
    PartialImage,
    Picture,
    parse_generation,
    sse,
    to_json,
)
from serve.settings import Base, Settings
from serve.share import FairShare
from serve.uploads import FILES, Uploads, begin, read_edit

log = logging.getLogger(__name__)

TRIES = 3
"""Replicas that a picture is asked of, one after the other, as they are lost."""
LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
GRACE_S = 1.0
"""A stream's first event is waited for so long, so that an error can still have its own status."""
PAGE = Path(__file__).with_name("page")
ASSETS = frozenset(file.name for file in PAGE.glob("*"))
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip
DECODING = 2
"""Uploads that are decoded at once: each may take half a gigabyte."""
KEEP_ALIVE_S = 10.0
"""Between two comments in a stream that has nothing to tell: proxies close silent connections."""

PICTURES = {
    "200": {
        "description": "Pictures; with stream, events.", "content": {"application/json": {}, "text/event-stream": {}},
    }
}  # fmt: skip

app = FastAPI(title="gtl", docs_url=None, redoc_url=None, responses=errors.RESPONSES)
app.add_middleware(metrics.CountRequests)
errors.install(app)


def body_of(model: type[Drawing], kind: str = "application/json", files: Sequence[str] = ()) -> dict[str, Any]:
    """The body in the API's own description."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
    schema["required"] = [*schema.get("required", ()), *files[:1]]
    schema["properties"]["adapters"] = schema["properties"]["adapters"] | {"items": schema.pop("$defs")["Adapter"]}
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}, "responses": PICTURES}


async def told(events: AsyncIterator[bytes], identity: str) -> AsyncIterator[bytes]:
    """A stream's events, with comments while there are none; an error is its last event.

    What it tells first is nothing, after a wait in which an error is still raised. It has begun then, so that the
    events end with it, also where a client leaves before it is sent anything.
    """
    following = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait([following], timeout=GRACE_S)
        if following.done():
            following.result()
        yield b""
        while True:
            done, _ = await asyncio.wait([following], timeout=KEEP_ALIVE_S)
            if not done:
                yield b": still drawing\n\n"
                continue
            try:
                event = following.result()
            except StopAsyncIteration:
                return
            except Exception as error:
                yield errors.sse_error(errors.api_error(error, identity))
                return
            yield event
            following = asyncio.ensure_future(anext(events))
    finally:
        following.cancel()


def size_text(size: tuple[int, int]) -> str:
    """WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


def json_of(data: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of JSON that is written already."""
    return Response(data, media_type="application/json", headers=dict(headers or {}))


# What its routes use has to stand before it, since they are serialised here; and no annotation may be text, since the
# copy's are not found where it is read.
@serve.ingress(app)
class Ingress:
    """One of any number of doors to the same generators."""

    def __init__(self, settings: dict[str, Any], generators: Mapping[str, DeploymentHandle[Any]]) -> None:
        """Read the registry, and again every `refresh_s`.

        Args:
            settings: See `Settings`.
            generators: Of each base, by its name.

        Raises:
            UserError: the registry cannot be read.
        """
        self._settings = Settings.model_validate(settings)
        self._catalog = Catalog(self._settings)
        self._generators = generators
        self._keys = None if self._settings.keys is None else KeyFile(self._settings.keys)
        self._limiter = share_out(self._settings.requests_per_minute, self._settings.ingresses)
        self._answers = replay.Answers()
        always = {base.name: generators[base.name] for base in self._catalog.bases if base.replicas.min}
        self._missing = Together(lambda: missing(always))
        self._counted = Together[list[list[Metric]]](lambda: ask_all("counted"))
        self._reread = Together[list[int]](lambda: ask_all("reread"))
        self._decoding = asyncio.Semaphore(DECODING)
        self._share = FairShare(self._settings.max_running, self._settings.max_waiting)
        metrics.RUNNING.set_function(lambda: self._share.num_in_work)
        metrics.WAITING.set_function(lambda: self._share.num_waiting)
        self._output = None if self._settings.output is None else Store(self._settings.output)
        self._refreshing = asyncio.get_event_loop().create_task(self._refresh())

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self._settings.refresh_s)
            try:
                await asyncio.to_thread(self._catalog.refresh)
            except Exception as error:  # a store that does not answer now: what was read before stands
                log.warning("the registry is as it was read before: %s", error)

    def _who(self, request: Request) -> str:
        """The name of who asks; "" where nobody needs a key.

        Raises:
            ApiError: 401, there is no key or an unknown one; 429, it asks too often.
        """
        who = "" if self._keys is None else self._keys.check(request.headers.get("authorization"))
        if self._limiter is not None and request.method == "POST":
            self._limiter.admit(who)
        return who

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz")
    async def readyz(self) -> Response:
        """Whether every base that is always up answers."""
        told = await self._missing()
        return JSONResponse({"status": "waiting" if told else "ready", "missing": told}, 503 if told else 200)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def scrape(self, request: Request) -> Response:
        """For Prometheus."""
        self._who(request)
        return Response(metrics.expose(await self._counted()), media_type=CONTENT_TYPE_LATEST)

    def counted(self) -> list[Metric]:
        """What this ingress counted."""
        return metrics.counted(serve.get_replica_context().replica_tag)

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page(self) -> Response:
        """The studio."""
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    async def asset(self, name: str) -> Response:
        """What the studio is made of."""
        if name not in ASSETS:
            raise HTTPException(404)
        return FileResponse(PAGE / name, headers=PAGE_HEADERS)

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        """Bases, adapters and aliases."""
        self._who(request)
        return json_of(to_json(ModelList(data=tuple(self._catalog.models()))))

    @app.get("/v1/models/{identity:path}")
    async def model(self, request: Request, identity: str) -> Response:
        """One of them."""
        self._who(request)
        return json_of(to_json(self._catalog.model(identity)))

    @app.get("/v1/adapters/{name}")
    async def adapter(self, request: Request, name: str, version: str | None = None) -> Response:
        """An adapter's card."""
        self._who(request)
        return json_of(self._catalog.card(name if version is None else f"{name}@{version}").to_json())

    @app.post("/v1/registry/refresh")
    async def refresh(self, request: Request) -> dict[str, int]:
        """Read the registry now: what was promoted since is served at once."""
        self._who(request)
        return {"models": min(await self._reread())}

    async def reread(self) -> int:
        """Read the registry for this ingress; the number of models."""
        await asyncio.to_thread(self._catalog.refresh)
        return len(self._catalog.models())

    @app.post("/v1/images/generations", openapi_extra=body_of(Generation))
    async def generations(self, request: Request) -> Response:
        """Draw pictures of a prompt."""
        who = self._who(request)
        text = await read_text(in_time(request, self._settings.timeout_s))
        asked = parse_generation(text, self._settings.limits, urls=self._output is not None)
        return await self._respond(asked, None, "image_generation", who, request)

    @app.post("/v1/images/edits", openapi_extra=body_of(Edit, "multipart/form-data", FILES))
    async def edits(self, request: Request) -> Response:
        """Draw pictures that begin at one that is sent."""
        who = self._who(request)
        sent = in_time(request, self._settings.timeout_s)
        asked, uploads = await read_edit(sent, self._settings.limits, urls=self._output is not None)
        return await self._respond(asked, uploads, "image_edit", who, request)

    async def _respond(
        self, asked: Drawing, uploads: Uploads | None, kind: str, who: str, request: Request
    ) -> Response:
        """What is asked for, drawn; not again where an Idempotency-Key says that it is the same request."""
        chosen = self._catalog.settle(asked)
        if asked.stream:
            (order,) = await self._orders(asked, uploads, chosen, request)
            return await self._stream(asked, chosen, order, kind, who, request)

        async def draw() -> bytes:
            return await self._answer(asked, chosen, await self._orders(asked, uploads, chosen, request), who)

        name = replay.name_of(request)
        sent = b"" if name is None else await asyncio.to_thread(replay.digest_of, asked, uploads)
        data, is_known = await self._answers.once(name, sent, draw)
        headers = {"Idempotency-Replayed": "true"} if is_known else {}
        return json_of(data, {**headers, **errors.id_headers(request)})

    async def _orders(self, asked: Drawing, uploads: Uploads | None, chosen: Chosen, request: Request) -> list[Order]:
        """One for each picture; nothing of them is left to chance afterwards."""
        base, limits = chosen.base, self._settings.limits
        start, size = None, asked.pixels and (asked.pixels[1], asked.pixels[0])
        if isinstance(asked, Edit) and uploads is not None:
            async with self._decoding:
                start, size = await asyncio.to_thread(begin, asked, uploads, limits, *self._catalog.bounds(base))
            if chosen.edits:
                start = replace(start, image_guidance=asked.image_guidance_scale or IMAGE_GUIDANCE)
        seed = asked.seed if asked.seed is not None else replay.seed_of(request, asked.n)
        steps, guidance = base.sampling(chosen.sampler)
        steps = asked.num_inference_steps or steps
        guidance = guidance if asked.guidance_scale is None else asked.guidance_scale
        told = {"model": base.source, "adapters": chosen.names, "request": errors.request_id(request)}
        return [
            Order(
                prompt=asked.prompt, negative_prompt=asked.negative_prompt or "", seed=seed + i, steps=steps,
                guidance=guidance, size=size, adapters=chosen.adapters, sampler=chosen.sampler, merged=chosen.merged,
                edit=start, previews=asked.partial_images, timeout_s=self._settings.timeout_s,
                output_format=asked.output_format, quality=asked.compression, told=told,
                keep_prompt=self._settings.keep_prompt,
            )
            for i in range(asked.n)
        ]  # fmt: skip

    async def _answer(self, asked: Drawing, chosen: Chosen, orders: list[Order], who: str) -> bytes:
        tasks = [asyncio.ensure_future(self._picture(chosen, order, who)) for order in orders]
        try:
            drawn = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        pictures = []
        for order, one in zip(orders, drawn, strict=True):
            if self._output is not None and asked.response_format == "url":
                key = f"{uuid.uuid4().hex}.{order.output_format}"  # nothing of it is the client's to choose
                await asyncio.to_thread(self._output.write, key, one.data)
                found = await asyncio.to_thread(link, self._output, key, self._settings.link_s)
                place: dict[str, Any] = {"url": found}
            else:
                place = {"b64_json": base64.b64encode(one.data).decode()}
            pictures.append(Picture(seed=order.seed, flagged=one.is_flagged or None, **place))
        return to_json(ImagesResponse(
            data=tuple(pictures), output_format=asked.output_format, size=size_text(drawn[0].size),
            seed=orders[0].seed, model=chosen.title,
        ))  # fmt: skip

    async def _picture(self, chosen: Chosen, order: Order, who: str) -> Drawn:
        async for drawn in self._draw(chosen, order, who):
            if drawn.preview is None:
                return drawn
        raise RuntimeError("a generator ended without a picture")

    async def _stream(
        self, asked: Drawing, chosen: Chosen, order: Order, kind: str, who: str, request: Request
    ) -> Response:
        lines = told(self._events(asked, chosen, order, kind, who), errors.request_id(request))
        await anext(lines)
        headers = {**errors.id_headers(request), "Cache-Control": "no-store"}
        return StreamingResponse(lines, media_type="text/event-stream", headers=headers)

    async def _events(self, asked: Drawing, chosen: Chosen, order: Order, kind: str, who: str) -> AsyncIterator[bytes]:
        async for drawn in self._draw(chosen, order, who):
            shared: dict[str, Any] = {
                "b64_json": base64.b64encode(drawn.data).decode(), "size": size_text(drawn.size),
                "output_format": asked.output_format, "flagged": drawn.is_flagged or None,
                "type": f"{kind}.{'completed' if drawn.preview is None else 'partial_image'}",
            }  # fmt: skip
            if drawn.preview is None:
                yield sse(Completed(seed=order.seed, model=chosen.title, **shared))
            else:
                yield sse(PartialImage(partial_image_index=drawn.preview, **shared))

    async def _draw(self, chosen: Chosen, order: Order, who: str) -> AsyncIterator[Drawn]:
        """Previews and the picture, when it is the turn of who asks."""
        began = time.monotonic()
        async with AsyncExitStack() as stack:
            try:
                await asyncio.wait_for(stack.enter_async_context(self._share.place(who)), order.timeout_s)
            except asyncio.TimeoutError:
                raise errors.timed_out(order.timeout_s) from None
            left = order.timeout_s - (time.monotonic() - began)
            async for drawn in self._ask(chosen.base, replace(order, timeout_s=left)):
                if drawn.preview is None:
                    metrics.count_picture(chosen, drawn, time.monotonic() - began)
                yield drawn

    async def _ask(self, base: Base, order: Order) -> AsyncIterator[Drawn]:
        """Previews and the picture; from another generator where one is lost on the way."""
        shown, end = -1, time.monotonic() + order.timeout_s
        for attempt in range(TRIES):
            left = end - time.monotonic()
            response: Any = self._generators[base.name].options(stream=True).draw.remote(replace(order, timeout_s=left))
            try:
                async for drawn in until(end, response):
                    if drawn.preview is None or drawn.preview > shown:
                        shown = shown if drawn.preview is None else drawn.preview
                        yield drawn
                return
            except asyncio.TimeoutError:
                raise errors.timed_out(self._settings.timeout_s) from None
            except BackPressureError as error:
                raise errors.overloaded(5.0) from error
            except Exception as error:
                is_lost = isinstance(error, LOST) or isinstance(getattr(error, "cause", error), Stopped)
                if not is_lost or attempt == TRIES - 1:
                    raise
            finally:
                response.cancel()
