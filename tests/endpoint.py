"""A registry of adapters for the built-in model, and an endpoint that serves it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gtl.adapters import Card, Registry
from gtl.adapters.card import base_of
from gtl.adapters.delta import write_delta
from gtl.adapters.formats import LoraExport, write_lora
from gtl.families import open_family
from tests.loras import random_lora

BASE = "builtin:tiny"


def fill_registry(folder: Path) -> Registry:
    """dog@v1, dog@v2 with @prod at v1, star@v1, words@v1 (text encoder too), frozen@v1 (a delta)."""
    family, registry = open_family(BASE), Registry(folder)
    unet, encoder = family.load("unet"), family.load("text_encoder")
    loras = {
        ("dog", "v1"): scaled(random_lora(unet, "unet", seed=1, only="attn")),
        ("dog", "v2"): scaled(random_lora(unet, "unet", seed=2, only="attn")),
        ("star", "v1"): scaled(random_lora(unet, "unet", seed=3, only="conv1")),
        ("words", "v1"): scaled(
            random_lora(unet, "unet", seed=4, only="attn2")
            | random_lora(encoder, "text_encoder", seed=5, only="q_proj")
        ),
    }
    base = base_of(family, BASE)
    for (name, version), tensors in loras.items():
        with tempfile.TemporaryDirectory() as place:
            write_lora(tensors, Path(place), config=LoraExport(rank=4, alpha=4.0))
            card = Card(name=name, version=version, base=base, tuner={"type": "lora", "rank": 4})
            registry.publish(name, version, Path(place), card)
    with tempfile.TemporaryDirectory() as place:
        moved = {f"unet.{name}": v * 1.05 for name, v in unet.named_parameters() if name.startswith("up_blocks")}
        write_delta(moved, Path(place))
        card = Card(name="frozen", version="v1", kind="delta", base=base, tuner={"type": "freeze"})
        registry.publish("frozen", "v1", Path(place), card)
    registry.promote("dog@v1", "prod")
    return registry


def scaled(tensors: dict[str, Any], factor: float = 0.6) -> dict[str, Any]:
    """So that pictures are still pictures."""
    return {name: value * factor for name, value in tensors.items()}


@contextmanager
def serving(registry: Path, port: int, **args: Any) -> Iterator[str]:
    """URL of an endpoint on the connected cluster, until the block ends."""
    from ray import serve

    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        deploy(registry, **args)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def deploy(registry: Path, **args: Any) -> None:
    """Deploy it, or another in its place."""
    from ray import serve

    from serve.app import build

    base = {"name": "tiny", "source": BASE, "slots": 4, "max_rank": 8, "merged": ["star"]}
    values = {"registry": str(registry), "bases": [base], "refresh_s": 3600, "timeout_s": 120, **args}
    serve.run(build(values), name="gtl", route_prefix="/")


def replicas_of(kind: str) -> list[Any]:
    """Those whose deployment's name has this in it."""
    import ray

    found = []
    for one in ray.util.list_named_actors(all_namespaces=True):
        if f"#{kind}" in one["name"]:
            with suppress(ValueError):  # it has just ended
                found.append(ray.get_actor(**one))
    return found
