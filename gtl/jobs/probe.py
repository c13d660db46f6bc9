"""What a job looks at before its command begins: its places from every node, and whether nodes were lost on the way."""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gtl.storage import Store
from gtl.types import Progress, UserError

WAIT_S = 120.0
"""That a node may take to start a process and to read an object."""
LOOK_S = 10.0
"""Between two looks at what the cluster has."""
DRAINED_IDLE = 4
"""Ray's NodeDeathInfo.AUTOSCALER_DRAIN_IDLE."""
GROW_S = 1800.0
"""That an autoscaler may take to add machines: GPUs are scarce, and the images of their containers large."""


def check_places(places: Mapping[str, str]) -> None:
    """Write a small object to each place, read it on every node, and take it away.

    Raises:
        UserError: a place cannot be written, or a node does not see what was written.
    """
    import ray

    token = f".gtl-job-{uuid.uuid4().hex}"
    others = [node for node in ray.nodes() if node["Alive"]]
    for key, place in places.items():
        store = Store(place)
        try:
            store.write(token, token.encode())
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        try:
            if len(others) > 1:
                read_everywhere(key, place, token, others)
        finally:
            store.delete(token)


def read_everywhere(key: str, place: str, token: str, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Read an object on every node.

    Raises:
        UserError: one does not see it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    reader = ray.remote(num_cpus=0, max_retries=0)(sees)
    asked = {
        reader.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            place, token
        ): str(node["NodeManagerAddress"])
        for node in nodes
    }
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=WAIT_S)
    for reference, node in asked.items():  # of which several may have one address
        if reason := ray.get(reference) if reference in done else f"no answer in {WAIT_S:.0f} s":
            raise UserError(
                f"{key}: {place}: node {node} does not see what the job's own node writes there ({reason}); set {key} "
                "to a bucket, or to a folder that all nodes mount"
            )


def sees(place: str, token: str) -> str:
    """Why an object cannot be read from here; empty if it can."""
    try:
        return "" if Store(place).read(token) == token.encode() else "it is another object"
    except FileNotFoundError:
        return "no such file"
    except UserError as error:
        return str(error)


def make_room(bundles: Sequence[Mapping[str, float]], progress: Progress) -> None:
    """Ask the autoscaler for places and wait until the cluster has them.

    Raises:
        UserError: it does not get them.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    wanted = {name: sum(bundle.get(name, 0) for bundle in bundles) for name in ("CPU", "GPU")}
    text = ", ".join(f"{amount:g} {name}s" for name, amount in wanted.items() if amount)
    request_resources(bundles=[dict(bundle) for bundle in bundles])
    begun = time.monotonic()
    try:
        while any(ray.cluster_resources().get(name, 0) < amount for name, amount in wanted.items()):
            waited = time.monotonic() - begun
            if waited > GROW_S:
                raise UserError(f"train.workers: the cluster did not grow to {text} in {waited / 60:.0f} min; ask less")
            progress("cluster", 0, 0, f"waiting until it has {text}")
            time.sleep(LOOK_S)
    finally:
        request_resources(bundles=[])  # it would outlive the job; the workers hold what they need from here on


def lost(nodes: Sequence[Mapping[str, Any]], before: Collection[str]) -> set[str]:
    """Ids of the nodes that were there before and died, other than by an autoscaler that found them idle.

    Args:
        nodes: As `ray.nodes()` lists them, dead ones too.
        before: Ids.
    """
    dead = (node for node in nodes if not node["Alive"] and node.get("DeathReason") != DRAINED_IDLE)
    return {str(node["NodeID"]) for node in dead} & set(before)
