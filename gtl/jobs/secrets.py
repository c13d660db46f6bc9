"""Secrets in the processes of a job, under their names in the environment."""

from __future__ import annotations

import json
import os
from typing import Any

KEY = "GTL_JOB_SECRETS"
"""In a job's environment: under which key the cluster has them."""
HOOK = f"{__name__}.load"
"""What Ray calls in every worker process of a job that has some."""


def load() -> None:
    """Put them into this process's environment; none, if the job is over."""
    from ray.experimental.internal_kv import _internal_kv_get

    held = _internal_kv_get(address())
    values: dict[str, Any] = json.loads(held) if held else {}
    os.environ.update(values)


def wipe() -> None:
    """Take them from the cluster."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(address())


def address() -> str:
    """Where the dashboard puts the package of that name."""
    return f"gcs://{os.environ[KEY]}"
