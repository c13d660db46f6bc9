"""`serve deploy` of a config, as on a cluster: Ray Serve's own command line and schema, and nothing of gtl's."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gtl.adapters import Registry
from gtl.storage import Store
from serve.keys import new_key
from tests.endpoint import BASE
from tests.ports import free_port

CONFIGS = Path(__file__).parents[2] / "serve"
START = """
import subprocess, sys, time
import httpx, ray

config, port, dashboard = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ray.init(
    address="local", num_cpus=4, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=dashboard
)
serve = [sys.executable, "-m", "ray.serve.scripts"]
subprocess.run([*serve, "deploy", config, "-a", f"http://127.0.0.1:{dashboard}"], check=True)
url, answer = f"http://127.0.0.1:{port}", None
for _ in range(180):
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5)
        if answer.status_code == 200:
            break
    except httpx.TransportError:
        pass
    time.sleep(1)
print("ready", answer.json())
"""
LOCAL = """
fields = {"prompt": "a red circle", "model": "tiny:dog@prod", "num_inference_steps": 2, "seed": 3}
drawn = httpx.post(f"{url}/v1/images/generations", json=fields, timeout=60)
print("drawn", drawn.status_code, drawn.json()["model"])
ray.shutdown()
"""
PRODUCTION = """
import base64, io, re
import openai
from PIL import Image

client = openai.OpenAI(base_url=f"{url}/v1", api_key=sys.argv[4], max_retries=0, timeout=300)
print("models", [model.id for model in client.models.list()])
for model in ("sdxl:dog@prod", "flux"):  # of flux there is no replica before it is asked
    answer = client.images.generate(prompt="a red circle", model=model, extra_body={"seed": 3})
    image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    print("drawn", answer.model_extra["model"], image.size, len(image.getcolors(5000) or ()) > 9)
try:
    openai.OpenAI(base_url=f"{url}/v1", api_key="gtl-wrong", max_retries=0).models.list()
except openai.AuthenticationError as error:
    print("refused", error.code)
told = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {sys.argv[4]}"}, timeout=60).text
print("ingresses", len(set(re.findall('gtl_pictures_running.*ingress="(.*?)"', told))))
ray.shutdown()
"""


def deploy(values: dict[str, Any], folder: Path, ask: str, *more: str) -> str:
    """What is printed; in a process of its own, since the tests' cluster has no dashboard, which takes a deployment."""
    file, port = folder / "serve.yaml", values["http_options"]["port"]
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-c", START + ask, str(file), str(port), str(free_port()), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.soak
def test_a_config_is_deployed_on_a_cluster(shelf: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((CONFIGS / "local.yaml").read_text())
    values["http_options"]["port"] = free_port()
    (application,) = values["applications"]
    application["args"]["registry"] = str(shelf)
    told = deploy(values, tmp_path, LOCAL)
    assert "ready {'status': 'ready', 'missing': []}" in told
    assert "drawn 200 tiny:dog@v1" in told


@pytest.mark.soak
def test_the_production_config_is_deployed_as_it_is_shipped(shelf: Path, tmp_path: Path, s3: str) -> None:
    """But for what needs GPUs, a bucket and models of its own, and for what others could reach: two bases, one of which
    is scaled from zero, two ingresses, keys, a registry in a bucket, logs in JSON."""
    bucket = f"{s3}/production"
    for file in sorted(path for path in shelf.rglob("*") if path.is_file()):
        Store(bucket).write(file.relative_to(shelf).as_posix(), file.read_bytes())
    key, line = new_key("ann")
    (tmp_path / "keys").write_text(line)
    values = yaml.safe_load((CONFIGS / "production.yaml").read_text())
    values["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    (application,) = values["applications"]
    application["args"] |= {"registry": bucket, "keys": str(tmp_path / "keys")}
    for base in application["args"]["bases"]:
        base["source"] = BASE
        base["replicas"]["gpus"] = 0
    told = deploy(values, tmp_path, PRODUCTION, key)
    names = [f"sdxl:{name}@{version}" for name, version, _ in Registry(shelf).list()]
    assert "ready {'status': 'ready', 'missing': []}" in told
    assert all(f"'{name}'" in told for name in ("sdxl", "flux", "sdxl:dog@prod", *names))
    assert "drawn sdxl:dog@v1 (64, 64) True" in told
    assert "drawn flux (64, 64) True" in told
    assert "refused invalid_api_key" in told
    assert "ingresses 2" in told
