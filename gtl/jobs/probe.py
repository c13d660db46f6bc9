"""What a job looks at before its command begins: its places from every node, and whether nodes were lost on the way."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
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


def check_nodes(places: Mapping[str, str]) -> None:
    """See that all nodes have this gtl, and that each place can be written, read on all of them, and emptied again.

    Raises:
        UserError: a node has another gtl or none, a place refuses, or a node does not see what was written.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1:
        for node, found in ask_everywhere(nodes, version_of).items():
            if found != (mine := version_of()):
                raise UserError(f"gtl: {mine} on the job's own node, on node {node} {found}; install the same on all")
    token = f".gtl-job-{uuid.uuid4().hex}"
    for key, place in places.items():
        try:
            check_place(place, token, nodes)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None


def check_place(place: str, token: str, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Write a small object to a place, read it on every node, and take it away.

    Raises:
        UserError: the place refuses, or a node does not see what was written.
    """
    store = Store(place)
    store.write(token, token.encode())
    try:
        if reason := sees(place, token):
            raise UserError(f"{place}: what is written there cannot be read ({reason}); check its rights")
        for node, reason in ask_everywhere(nodes if len(nodes) > 1 else [], sees, place, token).items():
            if reason:
                raise UserError(
                    f"{place}: node {node} does not see what the job's own node writes there ({reason}); name a "
                    "bucket, or a folder that all nodes mount"
                )
    finally:
        store.delete(token)


def ask_everywhere(nodes: Sequence[Mapping[str, Any]], what: Callable[..., str], *arguments: str) -> dict[str, str]:
    """What a function returns on every node, or why there is no answer, by the node's address and id."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(what)
    asked = {
        f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})": task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments)
        for node in nodes
    }
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=WAIT_S) if asked else ([], [])
    answers = {}
    for node, reference in asked.items():
        try:
            answers[node] = ray.get(reference) if reference in done else f"no answer in {WAIT_S:.0f} s"
        except ray.exceptions.RayError as error:  # the node has no gtl, or is gone
            answers[node] = str(error).strip().splitlines()[-1]
    return answers


def version_of() -> str:
    """Of gtl, where this runs."""
    from gtl import __version__

    return __version__


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
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    wanted = {name: sum(bundle.get(name, 0) for bundle in bundles) for name in ("CPU", "GPU")}
    text = ", ".join(f"{amount:g} {name}s" for name, amount in wanted.items() if amount)
    request_resources(bundles=[dict(bundle) for bundle in bundles])
    begun, client = time.monotonic(), internal_kv_get_gcs_client()
    try:
        while any(ray.cluster_resources().get(name, 0) < amount for name, amount in wanted.items()):
            if refused(client.get_cluster_status(), bundles):
                raise UserError(f"train.workers: the cluster cannot grow to {text}, as its autoscaler says; ask less")
            waited = time.monotonic() - begun
            if waited > GROW_S:
                raise UserError(f"train.workers: the cluster did not grow to {text} in {waited / 60:.0f} min; ask less")
            progress("cluster", 0, 0, f"waiting until it has {text}")
            time.sleep(LOOK_S)
    finally:
        request_resources(bundles=[])  # it would outlive the job; the workers hold what they need from here on


def refused(status: bytes, bundles: Sequence[Mapping[str, float]]) -> bool:
    """Whether an autoscaler has said that it may not add what these places need. Ray's first one (v1) never says.

    Args:
        status: A cluster's, a serialized GetClusterStatusReply.
        bundles: Of the request; what is said of an earlier one does not count.
    """
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    asked = Counter(frozenset(bundle.items()) for bundle in bundles)
    state = GetClusterStatusReply.FromString(status).autoscaling_state
    found = [
        {frozenset(one.request.resources_bundle.items()): one.count for one in constraint.resource_requests}
        for constraint in state.infeasible_cluster_resource_constraints
    ]
    return asked in found


def lost(nodes: Sequence[Mapping[str, Any]], before: Collection[str] = ()) -> set[str]:
    """Ids of the nodes that died, other than by an autoscaler that found them idle; also those that came late.

    Args:
        nodes: As `ray.nodes()` lists them, dead ones too.
        before: Ids of those that had died already.
    """
    dead = (node for node in nodes if not node["Alive"] and node.get("DeathReason") != DRAINED_IDLE)
    return {str(node["NodeID"]) for node in dead} - set(before)
