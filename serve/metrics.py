"""What the ingresses count, in Prometheus' format: each series says whose it is, and Prometheus adds them up."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.catalog import Chosen
from serve.order import Drawn

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
STEP_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
BATCHES = (1, 2, 4, 8, 16, 32, 64)

REQUESTS = Counter("gtl_requests", "Requests that were answered.", ["path", "status"])
RUNNING = Gauge("gtl_pictures_running", "Pictures in work.")
WAITING = Gauge("gtl_pictures_waiting", "Pictures that wait for a place.")
PICTURES = Counter("gtl_pictures", "Pictures that were drawn.", ["base", "adapter"])
LATENCY = Histogram("gtl_picture_seconds", "From admission to the picture.", ["base", "adapter"], buckets=SECONDS)
QUEUE = Histogram("gtl_queue_seconds", "In a generator until the first step.", ["base"], buckets=SECONDS)
STEP = Histogram("gtl_step_seconds", "Of a denoising step.", ["base"], buckets=STEP_SECONDS)
BATCH = Histogram("gtl_batch_size", "Pictures in a denoising step.", ["base"], buckets=BATCHES)
SLOTS = Counter("gtl_slots", "Pictures with adapters: hit, they were on the device already.", ["base", "result"])


def count_picture(chosen: Chosen, picture: Drawn, seconds: float) -> None:
    """A picture was drawn, so long after its admission."""
    base = chosen.base.name
    for adapter in [name for name, _ in chosen.adapters] or [""]:
        PICTURES.labels(base, adapter).inc()
        LATENCY.labels(base, adapter).observe(seconds)
    if picture.course is None:
        return
    waited, step, batch, was_there = picture.course
    QUEUE.labels(base).observe(waited)
    STEP.labels(base).observe(step)
    BATCH.labels(base).observe(batch)
    if chosen.adapters:
        SLOTS.labels(base, "hit" if was_there else "miss").inc()


def counted(ingress: str) -> list[Metric]:
    """What this process counted, of the ingress of this name."""
    found = list(REGISTRY.collect())
    for metric in found:
        metric.samples = [one._replace(labels={**one.labels, "ingress": ingress}) for one in metric.samples]
    return found


class Merged(Collector):
    """What several ingresses counted."""

    def __init__(self, found: Iterable[Iterable[Metric]]) -> None:
        """`counted` of each."""
        self._metrics: dict[str, Metric] = {}
        for metric in (metric for one in found for metric in one):
            if (known := self._metrics.setdefault(metric.name, metric)) is not metric:
                known.samples.extend(metric.samples)

    def collect(self) -> Iterable[Metric]:
        """Each metric once, with the series of all: the format wants them together."""
        return self._metrics.values()


def expose(found: Iterable[Iterable[Metric]]) -> bytes:
    """The text that is scraped, of `counted` of each ingress."""
    return generate_latest(Merged(found))


class CountRequests:
    """Middleware that counts answers by route and status; what has no route is under "other"."""

    def __init__(self, app: ASGIApp) -> None:
        """Around an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        is_told = False

        def count(status: int) -> None:
            nonlocal is_told
            is_told = True
            REQUESTS.labels(getattr(scope.get("route"), "path", "other"), str(status)).inc()

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            if not is_told:  # the framework answers a fault outside of here
                count(500)
            raise
