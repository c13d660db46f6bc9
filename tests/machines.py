"""Machines that an autoscaler adds to a cluster, as processes here; each has its own folder for what jobs bring."""

from __future__ import annotations

import functools
from typing import Any
from unittest.mock import patch

from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Machines(FakeMultiNodeProvider):
    """Ray's own, whose machines share a folder: each new one takes that of a running job away and lays it anew."""

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        own = functools.partial(RayParams, runtime_env_dir_name=f"runtime_resources_{self._next_node_id}")
        with patch("ray._private.parameter.RayParams", own):
            super()._create_node_with_resources_and_labels(*arguments)
