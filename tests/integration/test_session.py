"""Which cluster a command works on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = "import ray\nfrom gtl.session import session\nwith session():\n print(ray.get_runtime_context().gcs_address)"


@pytest.mark.parametrize("named", [True, False])
def test_only_a_cluster_that_is_named_is_joined(ray_cluster: None, named: bool) -> None:
    import ray

    running = ray.get_runtime_context().gcs_address
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if named:
        environment["RAY_ADDRESS"] = running
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # Another command's own cluster would end with that command, in the middle of this one.
    assert (done.stdout.split()[-1] == running) is named
