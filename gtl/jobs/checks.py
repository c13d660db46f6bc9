"""What is checked before anything is sent: that the cluster is one that the job can run on, and find its places on."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.config import Recipe
from gtl.config.base import is_url
from gtl.jobs.client import answered, ask
from gtl.jobs.work import Work
from gtl.session import Cluster
from gtl.train.resources import choose_resources
from gtl.types import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

UNGROUPED = re.compile(r"node_[0-9a-f]{56}")
"""What Ray calls the group of a node that no autoscaler began: by its id."""


@dataclass(frozen=True)
class Site:
    """The cluster that a job goes to."""

    ray: str
    """Its version."""
    nodes: int
    """That are alive."""
    has: Cluster
    grows: bool
    """An autoscaler adds nodes."""


def look(client: JobSubmissionClient) -> Site:
    """Ask the dashboard what the cluster is.

    Raises:
        UserError: it does not say, or has no node yet.
    """
    with answered(client.get_address()):
        version = ask(client, "/api/version")["ray_version"]
        listed = ask(client, "/api/v0/nodes?limit=10000")["data"]["result"]["result"]
        status = ask(client, "/api/cluster_status")["data"].get("clusterStatus") or {}
        site = site_of(version, listed, status)
    if not site.nodes:
        raise UserError(f"--address {client.get_address()}: no node of that cluster is alive yet; wait for its head")
    return site


def site_of(version: str, listed: Sequence[Mapping[str, Any]], status: Mapping[str, Any]) -> Site:
    """The cluster, from what the dashboard says of its nodes and its autoscaler.

    An autoscaler names the group of every node that it began, on the node (v2, KubeRay) or in its report (v1). Without
    one there is a report too, in which every node is a group of its own.
    """
    alive = [node for node in listed if node["state"] == "ALIVE"]
    totals = [node.get("resources_total") or {} for node in alive]
    gpus = [total.get("GPU", 0.0) for total in totals]
    cpus = sum(total.get("CPU", 0.0) for total in totals)
    grouped = any((node.get("labels") or {}).get("ray.io/node-group") for node in alive)
    groups = ((status.get("autoscalerReport") or {}).get("nodeTypeMapping") or {}).values()
    grows = grouped or not all(UNGROUPED.fullmatch(group) for group in groups)
    return Site(version, len(alive), Cluster(cpus, sum(gpus), max(gpus, default=0.0)), grows)


def check_versions(site: Site, sends_tree: bool) -> None:
    """Refuse to send code to another Ray than it was written with here; a recipe alone goes by the cluster's gtl.

    Raises:
        UserError: the versions differ.
    """
    import ray

    if sends_tree and site.ray != ray.__version__:
        raise UserError(
            f"ray: {ray.__version__} here, {site.ray} on the cluster: pip install ray=={site.ray}, or send the recipe "
            "alone with --recipe-only"
        )


def versions() -> dict[str, str]:
    """Of this process: what the job compares with its own."""
    from gtl import __version__

    return {"gtl": __version__, "python": ".".join(platform.python_version_tuple()[:2])}


def check_places(work: Work, nodes: int, tree: Path) -> str | None:
    """Refuse folders in the working tree where several machines would each have their own; returns what to warn of.

    A folder outside the tree may be one that all machines mount: the job finds that out.

    Raises:
        UserError: there is one.
    """
    kept = []
    for key, place in {**work.writes, **work.reads}.items():
        if is_url(place) or place.startswith("file://"):
            continue
        if nodes > 1 and Path(os.path.realpath(place)).is_relative_to(os.path.realpath(tree)):
            raise UserError(
                f"{key}: {place}: a folder of this machine, and the cluster has {nodes} nodes; set {key} to a bucket, "
                f"or to a folder outside {tree} that all of them mount"
            )
        if key in work.writes and nodes == 1:
            kept.append(key)
    return f"{', '.join(kept)}: on the disk of the cluster's one node; a bucket would outlive it" if kept else None


def check_room(recipe: Recipe, site: Site) -> list[dict[str, float]]:
    """The places that the run's workers need and the cluster has yet to make; none if it has them.

    Raises:
        UserError: it has not and cannot.
    """
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": None})})  # of there
    try:
        choose_resources(plain, site.has)
    except UserError:
        if not site.grows:
            raise
    else:
        return []
    asked = recipe.train
    fewest = asked.workers[0] if isinstance(asked.workers, tuple) else 1 if asked.workers == "auto" else asked.workers
    gpus = 1 if asked.gpus_per_worker == 1 or (asked.gpus_per_worker == "auto" and site.has.gpus) else 0
    return [{"CPU": float(asked.cpus_per_worker), **({"GPU": 1.0} if gpus else {})}] * fewest
