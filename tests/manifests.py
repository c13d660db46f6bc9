"""The manifests of cluster/ as values: read, put together, and held against the schemas of who will read them."""

import copy
import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
CRDS = ROOT.parent / "shared" / "data" / "kuberay_crds"

Manifest = dict[str, Any]
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The schemas are 50,000 lines, which take Python twenty seconds."""
EMBEDDED = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
"""Kind -> where the component embed/ puts the cluster."""


def plain() -> list[Manifest]:
    """All objects as they stand in the files, without kustomize: the cluster in the place that embed/ gives it."""
    files = [file for file in sorted(KUBERNETES.rglob("*.yaml")) if file.name != "kustomization.yaml"]
    found = [one for file in files for one in yaml.safe_load_all(file.read_text()) if "kind" in one]
    (cluster,) = [one for one in found if one["kind"] == "RayCluster"]
    for one in found:
        if one["kind"] in EMBEDDED:
            one["spec"][EMBEDDED[one["kind"]]] = copy.deepcopy(cluster["spec"])
    return json.loads(json.dumps(found))  # what an alias shares is two things to the reader


def overlays() -> list[str]:
    """Folders that are applied as they are: a Kustomization that is no base of all."""
    files = sorted(KUBERNETES.rglob("kustomization.yaml"))
    whole = [file.parent.name for file in files if yaml.safe_load(file.read_text())["kind"] == "Kustomization"]
    return [name for name in whole if name != "base"]


@cache
def build(overlay: str) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    command = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    if shutil.which(command[0]) is None:
        pytest.skip("neither kubectl nor kustomize is here")
    done = subprocess.run([*command, str(KUBERNETES / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@cache
def schema(kind: str) -> dict[str, Any]:
    """KubeRay's own schema of a kind, with what it does not name refused."""
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip(f"KubeRay's schemas are not there: {file}")
    versions = yaml.load(file.read_text(), Loader=Loader)["spec"]["versions"]
    (found,) = [one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1"]
    found["properties"]["metadata"] = strings("name", "namespace") | {"required": ["name"]}
    for key in ("labels", "annotations"):
        found["properties"]["metadata"]["properties"][key] = {"additionalProperties": {"type": "string"}}
    del found["properties"]["status"]  # the operator's
    return closed(found)


def strings(*keys: str) -> dict[str, Any]:
    return {"type": "object", "properties": {key: {"type": "string"} for key in keys}}


def closed(node: Any) -> Any:
    """A schema in which an object has no other keys than those that it names. An API server drops them silently."""
    if isinstance(node, list):
        return [closed(one) for one in node]
    if not isinstance(node, dict):
        return node
    result = {key: closed(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and node.get("type") == "object":
        result.setdefault("additionalProperties", False)
    return result


def refusals(manifest: Manifest) -> list[str]:
    """What KubeRay's schema has against a manifest; of a StatefulSet, against its pods."""
    if manifest["kind"] == "StatefulSet":
        found = schema("RayCluster")["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]
        checked = manifest["spec"]["template"]
    else:
        found, checked = schema(manifest["kind"]), manifest
    return [f"{e.json_path}: {e.message}" for e in jsonschema.Draft7Validator(found).iter_errors(checked)]


def pods(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Every pod template in a manifest, with the path to it."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, Manifest]]:
        if isinstance(node, list):
            for number, one in enumerate(node):
                yield from walk(one, f"{path}[{number}]")
        elif isinstance(node, dict):
            if "containers" in node:
                yield path, node
                return
            for key, value in node.items():
                yield from walk(value, f"{path}.{key}")

    yield from walk(manifest, manifest["kind"])


def values(node: Any, key: str) -> Iterator[Any]:
    """Everything that stands under a key, at any depth."""
    if isinstance(node, list):
        for one in node:
            yield from values(one, key)
    elif isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values(value, key)
