"""`serve.app:build`: the application of a Ray Serve config."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from serve.catalog import Catalog
from serve.generator import Generator
from serve.ingress import Ingress
from serve.routing import STATS_S
from serve.settings import Base, Settings, most_pixels, resolved


def build(args: dict[str, Any]) -> Application:
    """The application for the `args` of a config; see `serve.settings.Settings`.

    Raises:
        UserError: a key or value is wrong, or the registry cannot be read.
    """
    settings = resolved(args)
    bases = Catalog(settings).bases if settings.bases == "auto" else tuple(settings.bases)
    settings = settings.model_copy(update={"bases": list(bases)})
    generators = {base.name: generator(base, settings) for base in bases}
    ingress = serve.deployment(
        name="Ingress", num_replicas=settings.ingresses, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=settings.timeout_s,
    )(Ingress)  # fmt: skip
    return ingress.bind(settings.model_dump(mode="json"), generators)


def generator(base: Base, settings: Settings) -> Application:
    """The deployment of one base."""
    replicas = base.replicas
    scaling: dict[str, Any] = {"num_replicas": replicas.max}
    if replicas.min != replicas.max:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas.min, "initial_replicas": replicas.min, "max_replicas": replicas.max,
                "policy": {"policy_function": "serve.scaling:ByWork", "policy_kwargs": {"target_s": replicas.target_s}},
                "upscale_delay_s": 2.0, "downscale_delay_s": replicas.down_after_s,
                "downscale_to_zero_delay_s": replicas.to_zero_after_s,
                "metrics_interval_s": 1.0, "look_back_period_s": 2.0,
            }
        }  # fmt: skip
    deployed = serve.deployment(
        name=f"Generator:{base.name}",
        max_ongoing_requests=8 * base.max_batch,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": gpus_of(base)},
        graceful_shutdown_timeout_s=settings.timeout_s,  # what it draws is finished first
        request_router_config={
            "request_router_class": "serve.routing:ByAdapter",
            "request_routing_stats_period_s": STATS_S,
        },
        **scaling,
    )(Generator)
    safety = None if settings.safety is None else settings.safety.model_dump(mode="json")
    most = most_pixels(base, settings.limits, None)
    return deployed.bind(base.model_dump(mode="json"), settings.registry, settings.disk_gib, safety, most)


def gpus_of(base: Base) -> float:
    """Of each replica."""
    import ray

    if base.replicas.gpus != "auto":
        return base.replicas.gpus
    return float(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0)
