"""`serve deploy` of a config, as on a cluster: Ray Serve's own command line and schema, and nothing of gtl's."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ports import free_port

CONFIG = Path(__file__).parents[2] / "serve" / "local.yaml"
SCRIPT = """
import subprocess, sys, time
import httpx, ray

config, port, dashboard = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ray.init(address="local", include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=dashboard)
serve = [sys.executable, "-m", "ray.serve.scripts"]
subprocess.run([*serve, "deploy", config, "-a", f"http://127.0.0.1:{dashboard}"], check=True)
answer = None
for _ in range(120):
    try:
        answer = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5)
        if answer.status_code == 200:
            break
    except httpx.TransportError:
        pass
    time.sleep(1)
print("ready", answer.json())
fields = {"prompt": "a red circle", "model": "tiny:dog@prod", "num_inference_steps": 2, "seed": 3}
drawn = httpx.post(f"http://127.0.0.1:{port}/v1/images/generations", json=fields, timeout=60)
print("drawn", drawn.status_code, drawn.json()["model"])
ray.shutdown()
"""


@pytest.mark.soak
def test_a_config_is_deployed_on_a_cluster(shelf: Path, tmp_path: Path) -> None:
    """In a process of its own: the tests' cluster has no dashboard, which takes what is deployed."""
    values = yaml.safe_load(CONFIG.read_text())
    port = free_port()
    values["http_options"]["port"] = port
    (application,) = values["applications"]
    application["args"]["registry"] = str(shelf)
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-c", SCRIPT, str(file), str(port), str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ready {'status': 'ready', 'missing': []}" in done.stdout
    assert "drawn 200 tiny:dog@v1" in done.stdout
