"""cluster/: every manifest is one that its reader takes, and all of them agree with the pins and with each other."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from gtl import __version__
from gtl.config import load_recipe, load_study
from tests.manifests import CLUSTER, KUBERNETES, ROOT, Manifest, build, overlays, plain, pods, refusals, values

GUIDE = (CLUSTER / "README.md").read_text()
DOCKERFILE = (CLUSTER / "image" / "Dockerfile").read_text()
SBATCH = CLUSTER / "slurm" / "gtl.sbatch"
AGAIN = CLUSTER / "again.sh"
NOTICE = CLUSTER / "notice.sh"
LAUNCHERS = sorted((CLUSTER / "ray-up").glob("*.yaml"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
PINS = {pin.name: pin for pin in map(Requirement, (line for line in CONSTRAINTS if not line.startswith("#")))}
RAY = str(PINS["ray"].specifier).removeprefix("==")
PYTHON = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.M)[0]
TAG = re.compile(r"gtl:(?P<gtl>[\d.]+)-ray(?P<ray>[\d.]+)-py(?P<python>[\d.]+)-(?P<kind>cuda|cpu)\b")

BASE = {"Namespace": 1, "ServiceAccount": 1, "ConfigMap": 2, "NetworkPolicy": 1}
REDIS = {"Service": 1, "StatefulSet": 1}
OVERLAYS: dict[str, dict[str, int]] = {
    "raycluster": {**BASE, **REDIS, "NetworkPolicy": 2, "RayCluster": 1},
    "serve": {**BASE, **REDIS, "NetworkPolicy": 3, "RayService": 1, "PodDisruptionBudget": 1},
    "train": {**BASE, "RayJob": 1},
    "train-kueue": {**BASE, "RayJob": 1, "ClusterQueue": 1, "LocalQueue": 1, "ResourceFlavor": 1},
    "train-volcano": {**BASE, "RayJob": 1, "Queue": 1},
    "tune": {**BASE, "RayJob": 1},
}
"""What each sends, by kind."""


def only(found: Any, kind: str) -> Manifest:
    (one,) = [one for one in found if one["kind"] == kind]
    return one


def test_every_file_is_known() -> None:
    """Raise a number with every file you add, and see to it that a test below reads it."""
    files = [file for file in CLUSTER.rglob("*") if file.is_file()]
    assert Counter(file.suffix or file.name for file in files) == {
        ".yaml": 25, ".env": 1, ".md": 1, ".sh": 2, ".sbatch": 1, "Dockerfile": 1, ".dockerignore": 1,
    }  # fmt: skip
    assert Counter(one["kind"] for one in plain()) == {
        "Namespace": 1, "ServiceAccount": 1, "NetworkPolicy": 3, "RayCluster": 1, "RayJob": 2, "RayService": 1,
        "Service": 1, "StatefulSet": 1, "PodDisruptionBudget": 1, "ClusterQueue": 1, "LocalQueue": 1,
        "ResourceFlavor": 1, "Queue": 1,
    }  # fmt: skip
    assert sorted(overlays()) == sorted(OVERLAYS)


# Kubernetes


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_sends_what_it_is_for(overlay: str) -> None:
    found = build(overlay)
    assert Counter(one["kind"] for one in found) == OVERLAYS[overlay]
    without = {"Namespace", "ClusterQueue", "ResourceFlavor", "Queue"}  # these are the whole cluster's
    assert all(one["metadata"].get("namespace") == (None if one["kind"] in without else "gtl") for one in found)


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService", "StatefulSet"])
def test_kuberay_takes_what_stands_in_the_files(kind: str) -> None:
    checked = [one for one in plain() if one["kind"] == kind]
    assert checked
    assert [refusal for one in checked for refusal in refusals(one)] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberay_takes_what_an_overlay_sends(overlay: str) -> None:
    checked = [one for one in build(overlay) if one["kind"].startswith("Ray") or one["kind"] == "StatefulSet"]
    assert len(checked) == sum(n for kind, n in OVERLAYS[overlay].items() if kind[:3] in ("Ray", "Sta"))
    assert [refusal for one in checked for refusal in refusals(one)] == []


@pytest.mark.parametrize(
    ("path", "value", "refusal"),
    [
        (("spec", "rayClusterSpec", "headGroupSpec", "num_cpus"), "0", "'num_cpus' was unexpected"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "nodeselector"), {}, "'nodeselector'"),
        (
            ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "imagee"),
            "gtl", "'imagee' was unexpected",
        ),
        (("spec", "submitterPodTemplate", "spec", "containers", 0, "resources", "limit"), {}, "'limit'"),
        (("spec", "backoffLimit"), "2", "'2' is not of type 'integer'"),
        (("spec", "submissionMode"), 3, "3 is not of type 'string'"),
        (("metadata", "lables"), {}, "'lables' was unexpected"),
    ],
)  # fmt: skip
def test_a_slip_is_refused(path: tuple[str | int, ...], value: Any, refusal: str) -> None:
    job = next(one for one in plain() if one["kind"] == "RayJob")
    node: Any = job
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (found,) = refusals(job)
    assert refusal in found


def test_the_cluster_inside_is_the_one_of_the_base() -> None:
    spec = only(plain(), "RayCluster")["spec"]
    assert build("train")  # skips where there is nothing to build with
    for overlay in ("train", "tune"):
        inside = only(build(overlay), "RayJob")["spec"]["rayClusterSpec"]
        assert [group["groupName"] for group in inside["workerGroupSpecs"]] == ["gpu", "gpu-spot"]
        assert {**inside, **without_pods(inside)} == {**inside, **without_pods(spec)}
        assert "gcsFaultToleranceOptions" not in inside
    for name, kind, key in (("serve", "RayService", "rayClusterConfig"), ("raycluster", "RayCluster", None)):
        found = only(build(name), kind)["spec"]
        inside = found[key] if key else found
        assert {**inside, **without_pods(inside)} == {**inside, **without_pods(spec)}
        assert inside["gcsFaultToleranceOptions"]["redisAddress"] == "gtl-redis:6379"
    for overlay in ("train-kueue", "train-volcano"):
        inside = only(build(overlay), "RayJob")["spec"]["rayClusterSpec"]
        (group,) = inside["workerGroupSpecs"]
        assert not inside["enableInTreeAutoscaling"] and "autoscalerOptions" not in inside
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 4


def without_pods(spec: Manifest) -> Manifest:
    """What no overlay changes."""
    return {key: spec[key] for key in ("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions")}


def test_the_head_works_for_nobody_and_gpus_are_there_from_the_start() -> None:
    spec = only(plain(), "RayCluster")["spec"]
    head, groups = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    assert spec["authOptions"] == {"mode": "token", "secretName": "gtl-ray-token"}
    assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")
    assert [(g["groupName"], g["replicas"], g["minReplicas"], g["maxReplicas"]) for g in groups] == [
        ("gpu", 1, 1, 8), ("gpu-spot", 0, 0, 8),
    ]  # fmt: skip
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert pod["nodeSelector"]["nvidia.com/gpu.present"] == "true"
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert "karpenter.sh/capacity-type" in groups[1]["template"]["spec"]["nodeSelector"]


@pytest.mark.parametrize("source", ["plain", *OVERLAYS])
def test_every_pod_is_confined_and_has_time_to_save(source: str) -> None:
    found = plain() if source == "plain" else build(source)
    checked = [(path, pod) for one in found for path, pod in pods(one)]
    assert len(checked) >= (4 if source != "train-kueue" and source != "train-volcano" else 3)
    for path, pod in checked:
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0, path
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, path
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), path
        assert all(kind in ("name", "emptyDir", "configMap", "secret") for v in pod.get("volumes", []) for kind in v)
        for container in pod["containers"]:
            confined = container["securityContext"]
            assert confined["allowPrivilegeEscalation"] is False, path
            assert confined["capabilities"] == {"drop": ["ALL"]}, path
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"], path
            if container["name"] in ("ray-head", "ray-worker"):
                assert not {"livenessProbe", "readinessProbe", "startupProbe"} & set(container), "KubeRay's own"
                assert container["lifecycle"]["preStop"]["exec"]["command"][:2] == ["sh", "-c"]
                assert pod["terminationGracePeriodSeconds"] >= 120


def test_a_pod_that_ends_tells_ray_in_its_own_words() -> None:
    from ray.scripts.scripts import drain_node

    spec = only(plain(), "RayCluster")["spec"]
    (_, _, script) = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"][
        "command"
    ]
    words = shlex.split(script.split("&&")[0])
    assert words[:2] == ["ray", "drain-node"]
    given = drain_node.make_context("drain-node", words[2:]).params
    assert given["reason"] == "DRAIN_NODE_REASON_PREEMPTION" and given["node_id"] is None
    grace = spec["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert 0 < given["deadline_remaining_seconds"] < grace


def test_the_service_serves_the_production_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.command import read_config

    text = only(plain(), "RayService")["spec"]["serveConfigV2"]
    production = ROOT / "serve" / "production.yaml"
    assert yaml.safe_load(text) == yaml.safe_load(production.read_text()), "paste serve/production.yaml again"
    ServeDeploySchema.model_validate(yaml.safe_load(text))
    keys = read_config(production).settings.keys
    assert keys is not None
    for _, pod in pods(only(build("serve"), "RayService")):
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mounts[str(Path(keys).parent)]]
        assert volume["secret"] == {"secretName": "gtl-api-keys"}
    assert Path(keys).name in re.findall(r"gtl-api-keys .*--from-file=(\S+)", GUIDE)[0], "the guide fills it"


# What is run


def entrypoints() -> list[str]:
    return [one["spec"]["entrypoint"] for one in plain() if one["kind"] == "RayJob"]


def parse(words: list[str]) -> dict[str, Any]:
    """A command line as gtl would take it: its values. What gtl does not know is refused."""
    from gtl.cli import app

    command, name, values = typer.main.get_command(app), "gtl", dict[str, Any]()
    with typer.Context(command) as context:
        while hasattr(command, "commands"):
            name, command, words = command.resolve_command(context, words)
        values = command.make_context(name, words, parent=context).params
    if name == "submit":
        parse(values["command"])
    return {"command": name, **values}


def in_repository(path: str) -> Path:
    """The file that a path in a pod is, of the image or of a ConfigMap."""
    folder, mounts = Path(path), {}
    for volume in values(only(plain(), "RayCluster"), "volumes"):
        mounts.update({one["name"]: one["configMap"]["name"] for one in volume if "configMap" in one})
    for mount in next(values(only(plain(), "RayCluster"), "volumeMounts")):
        if Path(mount["mountPath"]) == folder.parent and mount["name"] in mounts:
            base = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text())
            (generated,) = [c for c in base["configMapGenerator"] if c["name"] == mounts[mount["name"]]]
            assert folder.name in generated["files"], f"{path}: not in the ConfigMap {generated['name']}"
            return KUBERNETES / "base" / folder.name
    copied = {target: source for source, target in re.findall(r"^COPY (\S+) (\S+)$", DOCKERFILE, re.M)}
    inside = folder.relative_to("/opt/gtl")  # the image's WORKDIR when it copies
    source = next(copied[str(parent)] for parent in inside.parents if str(parent) in copied)
    return ROOT / source / inside.relative_to(source)


def test_jobs_run_commands_that_gtl_has(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = dict(line.split("=", 1) for line in (KUBERNETES / "base" / "stores.env").read_text().splitlines())
    for variable, place in stores.items():
        monkeypatch.setenv(variable, place)
    commands = []
    for entrypoint in entrypoints():
        again, *words = shlex.split(entrypoint)
        assert again == "again" and "COPY cluster/again.sh /usr/local/bin/again" in DOCKERFILE
        assert shlex.join(words) == " ".join(words), "the shells on its way take nothing for themselves"
        assert parse([*words, "--resume"])["resume"] is True
        given = parse(words)
        commands.append(given["command"])
        overrides = [one.replace("=/recipes/", f"={KUBERNETES}/base/") for one in given["set_"] or []]
        if given["command"] == "train":
            recipe = load_recipe(in_repository(given["recipe"]), overrides)
            assert (recipe.train.workers, recipe.data.source) == ("auto", "s3://bucket/animals")
        else:
            recipe = load_study(in_repository(given["study"]), overrides).recipe
            assert recipe.train.gpus_per_worker == "auto"
        assert recipe.storage.model_dump() == {key.removeprefix("GTL_").lower(): stores[key] for key in stores}
    assert commands == ["train", "tune"]


def test_the_recipe_is_the_example() -> None:
    """Kustomize reads no file above its own folder."""
    for name in ("animals_sdxl_lora.yaml",):
        assert (KUBERNETES / "base" / name).read_bytes() == (ROOT / "gtl" / "recipes" / name).read_bytes()


def test_runtime_environments_are_ray_s() -> None:
    from ray.runtime_env import RuntimeEnv

    found = [yaml.safe_load(text) for one in plain() for text in values(one, "runtimeEnvYAML")]
    assert len(found) == 2
    for one in found:
        assert set(one) <= RuntimeEnv.known_fields
        assert RuntimeEnv(**one).env_vars() == {"NCCL_DEBUG": "WARN"}


GTL = """#!/bin/sh
# A command with the status that is asked for, which notes how it was called and what it was told.
echo "$@" >> calls
case "$*" in *--resume) exit "$RESUMED";; esac
exit "$BEGUN"
"""


@pytest.mark.parametrize(
    ("resumed", "begun", "status", "calls"),
    [
        (0, 9, 0, ["train x.yaml --resume"]),
        (2, 0, 0, ["train x.yaml --resume", "train x.yaml"]),  # nothing to go on with
        (2, 2, 2, ["train x.yaml --resume", "train x.yaml"]),  # a mistake, told by the second
        (1, 0, 1, ["train x.yaml --resume"]),  # it failed: what it saved is for the next start
        (130, 0, 130, ["train x.yaml --resume"]),  # it was stopped
    ],
)
def test_again_goes_on_or_begins(resumed: int, begun: int, status: int, calls: list[str], tmp_path: Path) -> None:
    (tmp_path / "gtl").write_text(GTL)
    (tmp_path / "gtl").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RESUMED": str(resumed), "BEGUN": str(begun)}
    done = subprocess.run([AGAIN, "train", "x.yaml"], cwd=tmp_path, env=environment)
    assert (done.returncode, (tmp_path / "calls").read_text().splitlines()) == (status, calls)


def test_again_outlives_the_signal_that_gtl_is_to_hear(tmp_path: Path) -> None:
    """Ray's jobs send it to every process, each once: gtl takes a second one for impatience."""
    program = """#!/bin/sh
trap 'echo saved >> heard; exit 130' TERM
: > ready
while :; do sleep 0.1; done
"""
    (tmp_path / "gtl").write_text(program)
    (tmp_path / "gtl").chmod(0o755)
    driver = f"""
import os, signal, subprocess, sys, time
import psutil
started = subprocess.Popen([{str(AGAIN)!r}, "train", "x.yaml"])
while not os.path.exists("ready"):
    time.sleep(0.05)
family = [psutil.Process(started.pid), *psutil.Process(started.pid).children()]
for one in family:
    one.send_signal(signal.SIGTERM)
sys.exit(started.wait())
"""
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", driver], cwd=tmp_path, env=environment)
    assert (done.returncode, (tmp_path / "heard").read_text()) == (130, "saved\n")


# Slurm, ray up, the image


def scripts() -> dict[str, str]:
    """Every shell script there is, also inside manifests."""
    found = {str(file.relative_to(ROOT)): file.read_text() for file in (AGAIN, NOTICE, SBATCH)}
    for one in plain():
        for path, pod in pods(one):
            for container in pod["containers"]:
                command = [*container.get("command", []), *container.get("args", [])]
                hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
                for words in (command, hook):
                    if words[:2] == ["sh", "-c"]:
                        found[f"{path}.{container['name']}"] = f"#!/bin/sh\n{words[2]}\n"
    return found


def test_shellcheck_has_nothing_to_say() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not here; it comes with the extra `dev`")
    found = scripts()
    assert len(found) == 3 + 1 + 3 * 3  # redis; a head and two groups of workers, in the cluster and where it is inside
    for name, script in found.items():
        done = subprocess.run([program, "-"], input=script, capture_output=True, text=True)
        assert done.stdout == "", name


def test_the_slurm_script_speaks_to_this_ray() -> None:
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

    text = SBATCH.read_text().replace("\\\n", " ")
    (line,) = re.findall(r"ray symmetric-run (.*?) -- ", text)
    words = shlex.split(line)
    given = symmetric_run.make_context("_", ["--address", "h:1", "--min-nodes", "2"]).params
    assert {"--address", "--min-nodes"} <= set(words) and (given["address"], given["min_nodes"]) == ("h:1", 2)
    rest = curate_and_validate_ray_start_args([word.replace("$SLURM_JOB_NUM_NODES", "2") for word in words])
    assert rest == ["--num-cpus", "$SLURM_CPUS_ON_NODE"]
    assert "--num-cpus" in {option for parameter in start.params for option in parameter.opts}


def test_the_slurm_script_says_how_it_is_used() -> None:
    done = subprocess.run(["bash", SBATCH, "train"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch ")
    options = re.findall(r"^#SBATCH (\S+)", SBATCH.read_text(), re.M)
    assert {"--requeue", "--exclusive", "--signal=B:USR1@300", "--ntasks-per-node=1"} <= set(options)


@pytest.mark.parametrize("file", LAUNCHERS, ids=lambda file: file.stem)
def test_ray_up_takes_the_file(file: Path) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.scripts.scripts import start

    config = prepare_config(yaml.safe_load(file.read_text()))
    validate_config(config)
    with pytest.raises(ValidationError):
        validate_config({**config, "idle_timeout": 5})
    assert config["setup_commands"] == [] == config["worker_setup_commands"], "not those that Ray would add"
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert config["available_node_types"]["gpu"]["min_workers"] >= 1
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    head, gpu = (config["available_node_types"][name]["node_config"] for name in ("head", "gpu"))
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}, "scheduling": {"provisioningModel": "SPOT"}}
    (key,) = set(spot) & set(gpu)
    assert key not in head and spot[key].items() <= gpu[key].items()
    known = {option for parameter in start.params for option in (*parameter.opts, *parameter.secondary_opts)}
    *workers, notice = config["worker_start_ray_commands"]
    assert notice.startswith(f"setsid --fork notice {file.stem} <")
    assert "COPY cluster/notice.sh /usr/local/bin/notice" in DOCKERFILE and re.search(r"install .* curl ", DOCKERFILE)
    for command in (*config["head_start_ray_commands"], *workers):
        assert set(re.findall(r"--[\w-]+", command)) <= known


class Metadata(BaseHTTPRequestHandler):
    """A cloud's, which takes the machine away when it is asked for the second time."""

    asked = 0

    def answer(self, status: int, body: str = "") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_PUT(self) -> None:  # noqa: N802
        is_known = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, "a-token") if is_known else self.answer(404)

    def do_GET(self) -> None:  # noqa: N802
        Metadata.asked += 1
        token, flavor = self.headers["X-aws-ec2-metadata-token"], self.headers["Metadata-Flavor"]
        if self.path == "/latest/meta-data/spot/instance-action" and token == "a-token":
            self.answer(200 if Metadata.asked > 1 else 404, '{"action": "terminate", "time": "2017-09-18T08:22:00Z"}')
        elif self.path == "/computeMetadata/v1/instance/preempted" and flavor == "Google":
            self.answer(200, "TRUE" if Metadata.asked > 1 else "FALSE")
        else:
            self.answer(401)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.mark.parametrize(("cloud", "most"), [("aws", 120), ("gcp", 30)])
def test_a_spot_machine_hands_its_notice_to_ray(cloud: str, most: int, tmp_path: Path) -> None:
    from ray.scripts.scripts import drain_node

    (tmp_path / "ray").write_text('#!/bin/sh\nfor word; do echo "$word"; done > called\n')
    (tmp_path / "ray").chmod(0o755)
    Metadata.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [str(NOTICE), cloud, f"http://127.0.0.1:{server.server_port}"]
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        assert subprocess.run(command, cwd=tmp_path, env=environment, timeout=60).returncode == 0
        server.shutdown()
    assert Metadata.asked == 2, "once in vain"
    name, *words = (tmp_path / "called").read_text().splitlines()
    given = drain_node.make_context("drain-node", words).params
    assert (name, given["reason"], given["node_id"]) == ("drain-node", "DRAIN_NODE_REASON_PREEMPTION", None)
    assert 20 <= given["deadline_remaining_seconds"] < most
    assert subprocess.run([str(NOTICE), "azure"], capture_output=True).returncode == 2


@pytest.mark.soak
def test_ray_rents_the_head_on_demand_and_gpus_on_spot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    moto = pytest.importorskip("moto", reason="moto is not installed; it comes with the extra `dev`")
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

    (tmp_path / ".ssh").mkdir()  # the key that Ray makes to reach its machines by
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    config = prepare_config(yaml.safe_load((CLUSTER / "ray-up" / "aws.yaml").read_text()))
    with moto.mock_aws():
        ec2, iam = boto3.client("ec2", config["provider"]["region"]), boto3.client("iam")
        image = ec2.register_image(Name="ours")["ImageId"]
        for kind in config["available_node_types"].values():
            iam.create_instance_profile(InstanceProfileName=kind["node_config"]["IamInstanceProfile"]["Name"])
            kind["node_config"]["ImageId"] = image  # the file says that it is the reader's to fill in
        config = AWSNodeProvider.bootstrap_config(config)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, kind in config["available_node_types"].items():
            tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_NODE_NAME: name, TAG_RAY_USER_NODE_TYPE: name}
            provider.create_node(kind["node_config"], tags, 1)
        rented = [one for r in ec2.describe_instances()["Reservations"] for one in r["Instances"]]
    assert {(one["InstanceType"], one.get("InstanceLifecycle")) for one in rented} == {
        ("m6i.xlarge", None), ("g6e.2xlarge", "spot"),
    }  # fmt: skip


def test_there_are_two_launchers() -> None:
    assert [file.stem for file in LAUNCHERS] == ["aws", "gcp"]


def test_the_image_is_pinned_and_nobody_s() -> None:
    text = DOCKERFILE.replace("\\\n", " ")
    installs = re.findall(r"pip install [^&\n]*", text)
    assert len(installs) == 3
    assert all("-c constraints.txt" in one or "--no-deps" in one for one in installs)
    assert all("--no-cache-dir" in one for one in installs)
    assert text.rindex("USER 1000:1000") > text.rindex("RUN ")
    assert "HEALTHCHECK" not in text
    assert re.findall(r"^ARG (\w+)", text, re.M) == ["PYTHON", "TORCH_INDEX", "EXTRAS"]
    ignored = (CLUSTER / "image" / "Dockerfile.dockerignore").read_text().splitlines()
    assert [line for line in ignored if line and line[0] not in "#!"] == ["*", "**/__pycache__"]
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    for source in (*copied, "serve"):
        assert (ROOT / source).exists()
        assert any(source == one or source.startswith(f"{one}/") for one in kept), f"{source}: is kept out"


def test_the_image_has_the_libraries_of_its_extras(tmp_path: Path) -> None:
    (program,) = re.findall(r"python -c '(.*?)'", DOCKERFILE)
    (extras,) = re.findall(r'^ARG EXTRAS="(.*)"$', DOCKERFILE, re.M)
    done = subprocess.run(
        [sys.executable, "-c", program, *extras.split()], cwd=ROOT, check=True, capture_output=True, text=True
    )
    wanted = [Requirement(line) for line in done.stdout.splitlines()]
    assert {"ray", "torch", "fastapi", "boto3", "bitsandbytes", "optuna", "wandb"} <= {one.name for one in wanted}
    assert {"default", "train", "tune", "serve"} == set().union(*(one.extras for one in wanted if one.name == "ray"))
    from packaging.utils import canonicalize_name

    assert [one.name for one in wanted if canonicalize_name(one.name) not in PINS] == []


# One source


def test_every_version_is_the_pin() -> None:
    text = {file: file.read_text() for file in CLUSTER.rglob("*") if file.is_file()}
    tags = [match.groupdict() for content in text.values() for match in TAG.finditer(content)]
    assert len(tags) >= 4
    assert all((t["gtl"], t["ray"], t["python"]) == (__version__, RAY, PYTHON) for t in tags)
    image = yaml.safe_load((KUBERNETES / "image" / "kustomization.yaml").read_text())["images"]
    assert [(one["name"], one["newTag"]) for one in image] == [("gtl", f"{__version__}-ray{RAY}-py{PYTHON}-cuda")]
    assert set(values(plain(), "rayVersion")) == {RAY}
    for file in LAUNCHERS:
        config = yaml.safe_load(file.read_text())
        assert config["docker"]["image"] == f"{image[0]['newName']}:{image[0]['newTag']}"
    project = (ROOT / "pyproject.toml").read_text()
    assert PYTHON in SpecifierSet(re.findall(r'^requires-python = "(.*)"', project, re.M)[0])
    assert f'"Programming Language :: Python :: {PYTHON}"' in project
    assert all(pin.marker is None or pin.marker.evaluate({"python_version": PYTHON}) for pin in PINS.values())
    assert "python:${PYTHON}-slim" in DOCKERFILE


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_image_is_the_tagged_one(overlay: str) -> None:
    tag = f"registry.example.com/gtl:{__version__}-ray{RAY}-py{PYTHON}-cuda"
    assert set(values(build(overlay), "image")) - {"redis:7.4-alpine"} == {tag}


def mentioned(found: Any) -> set[tuple[str, str]]:
    """(kind, name) of every object that another one goes by."""
    names = {("ConfigMap", one["name"]) for key in ("configMapRef", "configMap") for one in values(found, key)}
    names |= {("Secret", one["name"]) for key in ("secretRef", "secretKeyRef") for one in values(found, key)}
    names |= {("Secret", name) for name in values(found, "secretName")}
    names |= {("ServiceAccount", name) for name in values(found, "serviceAccountName")}
    names |= {("Service", address.partition(":")[0]) for address in values(found, "redisAddress")}
    names |= {("Service", name) for name in values(found, "serviceName")}
    names |= {("LocalQueue", name) for name in values(found, "kueue.x-k8s.io/queue-name")}
    names |= {("Queue", name) for name in values(found, "volcano.sh/queue-name")}
    names |= {("ClusterQueue", name) for name in values(found, "clusterQueue")}
    return names | {("ResourceFlavor", one["name"]) for flavors in values(found, "flavors") for one in flavors}


@pytest.mark.parametrize("source", ["plain", *OVERLAYS])
def test_every_name_is_declared_or_in_the_guide(source: str) -> None:
    found = plain() if source == "plain" else build(source)
    declared = {(one["kind"], one["metadata"]["name"]) for one in found}
    if source == "plain":
        base = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text())
        declared |= {("ConfigMap", one["name"]) for one in base["configMapGenerator"]}
    open_names = mentioned(found) - declared
    assert {kind for kind, _ in open_names} == {"Secret"}
    assert {name for _, name in open_names} <= {"gtl-ray-token", "gtl-redis", "gtl-api-keys", "gtl-credentials"}
    for _, name in open_names:
        assert f"kubectl -n gtl create secret generic {name} " in GUIDE, f"{name}: the guide does not make it"


def test_no_manifest_holds_a_secret() -> None:
    found = plain()
    assert "Secret" not in {one["kind"] for one in found}
    variables = [one for env in values(found, "env") for one in env]
    assert {one["name"] for one in variables if "value" in one} == {"RAY_JOB_STOP_WAIT_TIME_S"}
    assert all(set(one["valueFrom"]) == {"secretKeyRef"} for one in variables if "value" not in one)
    stores = {"GTL_RUNS", "GTL_CACHE", "GTL_REGISTRY"}
    lines = (KUBERNETES / "base" / "stores.env").read_text().splitlines()
    assert {line.partition("=")[0] for line in lines} == stores
    for file in LAUNCHERS:
        options = yaml.safe_load(file.read_text())["docker"]["run_options"]
        given = {one.removeprefix("-e ").partition("=")[0] for one in options if one.startswith("-e ")}
        assert given == {*stores, "RAY_AUTH_MODE", "RAY_JOB_STOP_WAIT_TIME_S"}
    tokens = re.findall(r"TOKEN=(.*)", SBATCH.read_text())
    assert len(tokens) == 1 and "/dev/urandom" in tokens[0]


# The guide


def test_the_guide_names_what_is_there() -> None:
    for path in re.findall(r"\b((?:cluster|gtl/recipes|serve|tune_configs)/[\w./-]*\w)", GUIDE):
        assert (ROOT / path).exists(), path
    for overlay in OVERLAYS:
        assert f"kubernetes/{overlay}" in GUIDE


def typed(text: str) -> list[list[str]]:
    """The words of every command of gtl in the blocks of a page, as a shell passes them on."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.match(r"(?:[A-Z_]+=\S* )*gtl (.*)|sbatch .*?/gtl\.sbatch (.*)", line):
                lexer = shlex.shlex(match[1] or match[2], posix=True, punctuation_chars="&|;<>")
                lexer.whitespace_split = True
                found.append(list(itertools.takewhile(lambda word: not set(word) <= set("&|;<>"), lexer)))
    return found


def named(text: str) -> list[list[str]]:
    """The same in its sentences."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return [shlex.split(span) for span in re.findall(r"`gtl\s([^`]*)`", prose)]


@pytest.mark.parametrize(("page", "lines", "spans"), [("README.md", 29, 37), ("cluster/README.md", 12, 8)])
def test_every_command_of_a_page_is_one_that_gtl_takes(page: str, lines: int, spans: int) -> None:
    text = (ROOT / page).read_text()
    assert (len(typed(text)), len(named(text))) == (lines, spans)
    for words in typed(text):
        parse(words)
    for words in named(text):
        assert (path := command_of(words)) or words == ["--help"]
        if path and words != path:  # else it only names the command
            parse(words)


def command_of(words: list[str]) -> list[str]:
    """The first words, as far as they are the name of a command."""
    from gtl.cli import app

    command, names = typer.main.get_command(app), list[str]()
    for word in words:
        if word not in (inner := getattr(command, "commands", {})):
            break
        command, names = inner[word], [*names, word]
    return names


def test_the_guide_watches_what_the_endpoint_counts() -> None:
    from prometheus_client import REGISTRY

    import serve.metrics

    assert serve.metrics.REQUESTS in REGISTRY._collector_to_names
    exported = {
        name for collector, names in REGISTRY._collector_to_names.items()
        if any(collector is value for value in vars(serve.metrics).values()) for name in names
    }  # fmt: skip
    told = set(re.findall(r"\bgtl_\w+", GUIDE))
    assert told <= exported
    roots = {metric._name for metric in vars(serve.metrics).values() if hasattr(metric, "_name")}
    assert len(roots) == 9
    assert [root for root in roots if not any(name.startswith(root) for name in told)] == []


def test_the_guide_watches_what_ray_counts() -> None:
    import ray

    told = set(re.findall(r"`ray_(\w+)`", GUIDE))
    assert len(told) == 6
    folder = Path(ray.__file__).parent
    sources = [*(folder / "serve" / "_private").glob("*.py"), *(folder / "dashboard/modules/reporter").glob("*.py")]
    text = "".join(file.read_text() for file in sources)
    assert [name for name in sorted(told) if f'"{name}"' not in text] == []
