"""Adapters of every family fused by every method: what a sum gives is both at once, and all of it is read again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gtl.adapters import Card, Registry
from gtl.adapters.card import base_of
from gtl.adapters.combine import METHODS
from gtl.adapters.formats import LoraExport, write_lora
from gtl.adapters.fuse import fuse
from gtl.adapters.merge import merge
from gtl.families import open_family
from tests.contract.test_families import FACTS, FIRST
from tests.loras import random_lora

SHARES = {"low": 0.7, "high": -0.4}


@pytest.mark.parametrize("name", FIRST.values())
def test_every_family_is_fused_by_every_method(tmp_path: Path, written: Callable[[str], Path], name: str) -> None:
    source = str(written(name))
    family = open_family(source)
    registry, base, main = Registry(tmp_path / "registry"), base_of(family, source), family.main
    for seed, (adapter, rank) in enumerate({"low": 2, "high": 3}.items()):
        network = family.load(main, torch.float32)
        layer = FACTS[family.name].attention[seed]  # each has layers that the other has not
        tensors = random_lora(network, main, rank=rank, seed=seed, only=layer) | random_lora(
            network, main, rank=rank, seed=seed + 2, only=FACTS[family.name].attention[3]
        )
        write_lora(tensors, tmp_path / adapter, config=LoraExport(rank=rank, alpha=rank))
        registry.publish(adapter, "v1", tmp_path / adapter, Card(name=adapter, version="v1", base=base, tuner={
            "type": "lora", "rank": rank,
        }))  # fmt: skip

    def merged(*adapters: tuple[str, float]) -> dict[str, torch.Tensor]:
        network = family.load(main, torch.float32)
        merge({main: network}, [(registry.fetch(adapter), scale) for adapter, scale in adapters])
        return dict(network.named_parameters())

    plain, both = merged(), merged(*SHARES.items())
    moved = {key for key, value in both.items() if not torch.equal(value, plain[key])}
    assert moved
    for method in METHODS:
        made = fuse(registry, list(SHARES.items()), method, name=method)
        fusion = registry.show(str(made)).lineage.fusion
        assert fusion is not None and fusion.adapters == ["low@v1", "high@v1"]
        found = merged((str(made), 1.0))
        changed = {key for key, value in found.items() if not torch.equal(value, plain[key])}
        assert changed <= moved and len(changed) > len(moved) / 2  # DARE may drop all of a small layer
        if method in ("linear", "cat"):
            for key in moved:
                torch.testing.assert_close(found[key], both[key], rtol=1e-4, atol=1e-5)
