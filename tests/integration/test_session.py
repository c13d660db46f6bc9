"""Which cluster a command works on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gtl.session import Cluster, grown

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


def test_a_cluster_is_what_it_may_grow_to() -> None:
    head, worker = {"CPU": 4.0}, {"CPU": 16.0, "GPU": 8.0}
    assert grown([head, worker], []) == Cluster(20, 8, 8, 8)
    assert grown([head], [(head, 0), (worker, 3)]) == Cluster(48, 24, 8, 0), "from none"
    assert grown([head, worker, worker], [(worker, 1)]) == Cluster(36, 16, 8, 16), "more than it would start by itself"
    assert grown([head], [(worker, -1)]) == Cluster(4, 0, 8, 0), "no bound is not a number"
    # Where nobody says how many, nothing is rented beyond one machine.
    assert [grown(nodes, [(worker, 3)]).gpus_at_hand for nodes in ([head], [worker], [worker, worker])] == [8, 8, 16]
