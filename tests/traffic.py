"""Traffic of every kind on an endpoint, and what became of it."""

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

from gtl.adapters import Registry

PATIENCE_S = 90.0
"""No answer for so long, and a request counts as lost."""
SIZES = ("64x64", "64x64", "96x64", "64x128")
MODELS = ("tiny", "tiny:dog@prod", "tiny:dog@v1", "dog@v2", "tiny:star", "tiny:words@v1", "tiny:frozen@v1")
SUMS: tuple[tuple[str, list[Any]], ...] = (
    ("tiny", ["dog@v1:0.5", {"name": "star@v1", "scale": -0.4}]),
    ("tiny:words@v1", [{"name": "dog@v2", "scale": 0.7}]),
    ("tiny:star@v1", ["frozen@v1:0.5"]),
    ("tiny", ["words@v1:-0.3"]),
)
WRONG: tuple[tuple[dict[str, Any], int, str], ...] = (
    ({"num_inference_steps": 0}, 400, "num_inference_steps"), ({"size": "63x64"}, 400, "size"),
    ({"model": "tiny:cat"}, 404, "model"), ({"adapters": ["cat"]}, 404, "adapters"), ({"n": 0}, 400, "n"),
    ({"lora": "/etc/passwd"}, 400, "lora"), ({"model": "tiny:dog@v1", "adapters": ["dog@v1"]}, 400, "adapters"),
)  # fmt: skip


@dataclass
class Shown:
    """A picture that came back, and what was asked for."""

    fields: dict[str, Any]
    """With the seed of this one."""
    model: str
    """As the answer names it: with versions in place of aliases."""
    image: Image.Image
    edited: Image.Image | None = None
    mask: Image.Image | None = None


@dataclass
class Traffic:
    """A number of users who ask one thing after the other, each in a way that chance decides."""

    url: str
    registry: Registry
    seed: int = 0
    keep: float = 0.05
    """Share of the pictures that are kept."""
    asked: "Counter[str]" = field(default_factory=Counter)
    """Requests by kind."""
    faults: list[str] = field(default_factory=list)
    """What should not have been."""
    shown: list[Shown] = field(default_factory=list)

    async def run(self, seconds: float, users: int) -> None:
        """Until the time is up and every answer is there."""
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S, limits=limits) as client:
            await asyncio.gather(*(self._use(client, random.Random(self.seed + n), end) for n in range(users)))

    async def _use(self, client: httpx.AsyncClient, chance: random.Random, end: float) -> None:
        kinds: list[tuple[Callable[..., Awaitable[None]], float]] = [
            (self._pictures, 30), (self._stream, 15), (self._edit, 15), (self._leave, 15), (self._leave_stream, 10),
            (self._wrong, 10), (self._half, 3), (self._promote, 3), (self._look, 5),
        ]  # fmt: skip
        while time.monotonic() < end:
            (ask,) = chance.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
            name = ask.__name__.strip("_")
            self.asked[name] += 1
            try:
                await asyncio.wait_for(ask(client, chance), PATIENCE_S)
            except Exception as error:
                self.faults.append(f"{name}: {type(error).__name__}: {error}")

    def _fields(self, chance: random.Random, **more: Any) -> dict[str, Any]:
        model, adapters = chance.choice([*((model, []) for model in MODELS), *SUMS])
        fields = {
            "prompt": f"a circle, number {chance.randrange(400)}", "model": model, "seed": chance.randrange(2**32),
            "size": chance.choice(SIZES), "num_inference_steps": chance.randint(1, 30),
            "guidance_scale": chance.choice([0.0, 1.0, 3.5, 7.5]),
        }  # fmt: skip
        if adapters:
            fields["adapters"] = adapters
        if chance.random() < 0.3:
            fields["negative_prompt"] = chance.choice(["a square", "blue"])
        return fields | more

    def _expect(self, answer: httpx.Response, status: int = 200) -> None:
        if answer.status_code != status:
            raise AssertionError(f"{answer.status_code}, expected {status}: {answer.text[:300]}")

    def _show(self, chance: random.Random, fields: dict[str, Any], answer: Any, i: int, data: str, **more: Any) -> None:
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        image.load()
        expected = tuple(map(int, fields["size"].split("x")))
        if image.size != expected:
            raise AssertionError(f"a picture of {image.size}, expected {expected}")
        if fields.get("output_format", "png") == "png" and chance.random() < self.keep:
            self.shown.append(Shown({**fields, "seed": fields["seed"] + i}, answer["model"], image, **more))

    async def _pictures(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        n, form = chance.choice([1, 1, 1, 2, 3]), chance.choice(["png", "png", "webp", "jpeg"])
        fields = self._fields(chance, n=n, output_format=form)
        answer = await client.post("/v1/images/generations", json=fields)
        self._expect(answer)
        told = answer.json()
        if len(told["data"]) != n:
            raise AssertionError(f"{len(told['data'])} pictures, expected {n}")
        for i, one in enumerate(told["data"]):
            self._show(chance, fields, told, i, one["b64_json"])

    async def _stream(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        fields = self._fields(chance, stream=True, partial_images=chance.randint(0, 3))
        events = []
        async with client.stream("POST", "/v1/images/generations", json=fields) as answer:
            if answer.status_code != 200:
                await answer.aread()
            self._expect(answer)
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line.removeprefix("data: ")))
        numbers = [event.get("partial_image_index") for event in events]
        wanted = min(fields["partial_images"], fields["num_inference_steps"] - 1)
        if numbers != [*range(wanted), None]:
            raise AssertionError(f"events {numbers}, expected {wanted} previews and a picture: {str(events)[:300]}")
        self._show(chance, fields, events[-1], 0, events[-1]["b64_json"])

    async def _edit(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        fields = self._fields(chance, strength=chance.choice([0.5, 0.8, 1.0]))
        fields["num_inference_steps"] = max(2, fields["num_inference_steps"])
        wide, high = map(int, fields["size"].split("x"))
        image, mask = Image.new("RGB", (wide, high), (chance.randrange(256), 90, 200)), None
        files = {"image": ("image.png", png(image))}
        if chance.random() < 0.5:
            mask = Image.new("RGBA", image.size, (0, 0, 0, 255))
            mask.paste((0, 0, 0, 0), (wide // 2, 0, wide, high))
            files["mask"] = ("mask.png", png(mask))
        data = {name: json.dumps(value) if isinstance(value, list) else str(value) for name, value in fields.items()}
        answer = await client.post("/v1/images/edits", data=data, files=files)
        self._expect(answer)
        self._show(chance, fields, answer.json(), 0, answer.json()["data"][0]["b64_json"], edited=image, mask=mask)

    async def _leave(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """At any moment before the answer."""
        fields = self._fields(chance, num_inference_steps=chance.randint(1, 60))
        try:
            asked = client.post("/v1/images/generations", json=fields)
            self._expect(await asyncio.wait_for(asked, chance.expovariate(4)))
        except asyncio.TimeoutError:
            self.asked["gone"] += 1

    async def _leave_stream(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """After a few of its bytes."""
        fields = self._fields(chance, stream=True, partial_images=3)
        async with client.stream("POST", "/v1/images/generations", json=fields) as answer:
            self._expect(answer)
            left = chance.randrange(60_000)
            async for chunk in answer.aiter_bytes(1000):
                left -= len(chunk)
                if left < 0:
                    self.asked["gone"] += 1
                    return

    async def _wrong(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        more, status, param = chance.choice(WRONG)
        answer = await client.post("/v1/images/generations", json={"prompt": "a circle", **more})
        self._expect(answer, status)
        if answer.json()["error"]["param"] != param:
            raise AssertionError(f"param of {answer.text[:300]}, expected {param}")

    async def _half(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """Half a request, and the line goes dead."""
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Length: 500\r\n\r\n"
        writer.write(f'{head}{{"prompt": "a cir'.encode()[: chance.randrange(10, 120)])
        await writer.drain()
        writer.close()

    async def _promote(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        await asyncio.to_thread(self.registry.promote, chance.choice(["dog@v1", "dog@v2"]), "prod")
        self._expect(await client.post("/v1/registry/refresh"))

    async def _look(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        for path in ("/healthz", "/metrics", "/v1/models", "/v1/models/tiny:dog@prod", "/v1/adapters/star", "/"):
            self._expect(await client.get(path))


def png(image: Image.Image) -> bytes:
    """Its bytes."""
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()
