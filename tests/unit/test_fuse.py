"""Adapters fused into one: what the arithmetic gives, and what is published of it."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from gtl.adapters import Card, Registry, apply
from gtl.adapters.card import base_of
from gtl.adapters.combine import Method, Weights, combine, merge, soup
from gtl.adapters.commands import fuse_adapters, read_blocks
from gtl.adapters.delta import write_delta
from gtl.adapters.formats import LoraExport, LoraWeights, write_lora
from gtl.adapters.fuse import fuse
from gtl.adapters.merge import merge as merge_into
from gtl.adapters.read import read_safetensors
from gtl.cli import main
from gtl.families import open_family
from gtl.types import UserError
from tests.endpoint import BASE
from tests.loras import random_lora

TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.1.resnets.0.conv1"
LAYER = "unet.block.layer"
"""Of LoRAs that are for no model."""


@pytest.fixture(scope="module")
def family():
    return open_family(BASE)


@pytest.fixture(scope="module")
def registry(family, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """LoRAs wide@v1 (rank 4, alpha 2), tall@v1 (rank 3, rsLoRA, alpha 6), dora@v1, other@v1 (of another base); deltas
    early@v1, late@v1 of overlapping blocks."""
    unet, folder = family.load("unet", torch.float32), tmp_path_factory.mktemp("fuse")
    registry, base = Registry(folder / "registry"), base_of(family, BASE)
    encoder = family.load("text_encoder", torch.float32)
    loras = {
        "wide": (random_lora(unet, "unet", seed=1, only="down_blocks.1"), LoraExport(rank=4, alpha=2)),
        "tall": (
            random_lora(unet, "unet", seed=2, rank=3, only=TO_Q)
            | random_lora(unet, "unet", seed=3, rank=5, only=CONV)
            | random_lora(encoder, "text_encoder", seed=4, rank=3, only="layers.0.self_attn.q_proj"),
            LoraExport(rank=3, alpha=6, rslora=True, alphas={f"unet.{CONV}": 1.5}),
        ),
        "dora": (random_lora(unet, "unet", only=TO_Q, dora=True), LoraExport(rank=4, alpha=4, dora=True)),
        "other": (random_lora(unet, "unet", only=TO_Q), LoraExport(rank=4, alpha=4)),
    }
    for name, (tensors, config) in loras.items():
        write_lora(tensors, folder / name, config=config)
        own = base.model_copy(update={"fingerprint": "0" * 64}) if name == "other" else base
        card = Card(name=name, version="v1", base=own, tuner={"type": "lora", "dora": config.dora})
        registry.publish(name, "v1", folder / name, card)
    for name, factor, blocks in (
        ("early", 1.1, ("down_blocks.1", "down_blocks.2")),
        ("late", 0.8, ("down_blocks.2", "conv_out")),
    ):
        moved = {f"unet.{key}": value * factor for key, value in unet.named_parameters() if key.startswith(blocks)}
        write_delta(moved, folder / name)
        card = Card(name=name, version="v1", kind="delta", base=base, tuner={"type": "freeze"})
        registry.publish(name, "v1", folder / name, card)
    return registry


def weights_with(family, registry: Registry, *adapters: tuple[str, float]) -> dict[str, torch.Tensor]:
    """The model's weights with adapters merged in, of both parts."""
    parts = {"unet": family.load("unet", torch.float32), "text_encoder": family.load("text_encoder", torch.float32)}
    merge_into(parts, [(registry.fetch(name), scale) for name, scale in adapters])
    return {f"{part}.{key}": value for part, module in parts.items() for key, value in module.named_parameters()}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((value - b[name]).detach().abs().max()) for name, value in a.items())


def lora(seed: int, rank: int = 2, shape: tuple[int, int] = (6, 5), layer: str = LAYER, **config) -> LoraWeights:
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(rank, shape[1], generator=rng),
        f"{layer}.lora_B.weight": torch.randn(shape[0], rank, generator=rng),
    }
    return LoraWeights(tensors, LoraExport(**{"rank": rank, "alpha": rank, **config}), {})


def update(tensors: dict[str, torch.Tensor], layer: str = LAYER) -> torch.Tensor:
    return tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]


def keep_largest(matrix: torch.Tensor, density: float) -> torch.Tensor:
    """The int(density * count) values that are largest."""
    count = int(density * matrix.numel())
    order = sorted(matrix.flatten().tolist(), key=abs, reverse=True)
    return torch.where(matrix.abs() >= abs(order[count - 1]), matrix, 0.0)


def ties_by_hand(updates: list[torch.Tensor], density: float) -> torch.Tensor:
    """Trim, elect the sign with more mass, average those of that sign; a value at a time."""
    trimmed = [keep_largest(each, density) for each in updates]
    result = torch.zeros_like(updates[0])
    for row in range(result.shape[0]):
        for column in range(result.shape[1]):
            values = [float(each[row, column]) for each in trimmed]
            sign = 1 if sum(values) >= 0 else -1
            agreeing = [value for value in values if value * sign > 0]
            result[row, column] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_a_sum_is_all_adapters_at_once(family, registry: Registry, method: str) -> None:
    """Of other ranks, scales, rsLoRA, a convolution, and layers and a part that only one of them has."""
    fused = fuse(registry, [("wide", 0.7), ("tall@v1", -0.4)], method, name=method)
    both = weights_with(family, registry, ("wide", 0.7), ("tall", -0.4))
    assert furthest(weights_with(family, registry, (str(fused), 1.0)), both) < 1e-5
    assert furthest(weights_with(family, registry), both) > 1e-2


def test_svd_at_the_full_rank_is_cat() -> None:
    loras, weights = [lora(1), lora(2, alpha=3.0)], Weights([0.5, 2.0])
    exact = 0.5 * update(loras[0].tensors) + 2.0 * 3.0 / 2 * update(loras[1].tensors)
    for method in (Method("cat"), Method("svd", rank=4), Method("linear")):
        combined = combine(loras, weights, method)
        assert combined.tensors[f"{LAYER}.lora_A.weight"].shape == (4, 5)
        torch.testing.assert_close(update(combined.tensors), exact, atol=1e-5, rtol=1e-5)
        assert combined.lost == 0.0


def test_a_lower_rank_loses_the_dropped_singular_values_and_no_more() -> None:
    loras = [lora(1, rank=3), lora(2, rank=2, rslora=True, alpha=2.0)]
    exact = update(loras[0].tensors) + 2 / math.sqrt(2) * update(loras[1].tensors)
    values = torch.linalg.svdvals(exact.double())
    errors = []
    for rank in (1, 2, 3):
        combined = combine(loras, Weights([1.0, 1.0]), Method("svd", rank=rank))
        errors.append(float((update(combined.tensors) - exact).norm()))
        assert errors[-1] == pytest.approx(float(values[rank:].norm()), rel=1e-4)
        assert combined.lost == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-4)
    assert all(more > less for more, less in pairwise(errors))
    assert len(combine(loras, Weights([1.0, 1.0]), Method("svd")).tensors[f"{LAYER}.lora_A.weight"]) == 3  # the largest


def test_a_sum_takes_no_more_rank_than_it_has() -> None:
    """One adapter in two versions of the same factors is one of the same rank; one less itself is nothing."""
    one = lora(1)
    twice = combine([one, one], Weights([0.25, 0.5]), Method("linear")).tensors
    assert twice[f"{LAYER}.lora_A.weight"].shape == (2, 5)
    torch.testing.assert_close(update(twice), 0.75 * update(one.tensors))
    assert combine([one, one], Weights([1.0, -1.0]), Method("linear")).tensors == {}


@pytest.mark.parametrize("density", [0.3, 0.8, 1.0])
def test_ties_by_hand(density: float) -> None:
    """Weights count in the election: also a negative one, and one of zero is not there."""
    loras, weights = [lora(1), lora(2), lora(3), lora(4)], [1.0, -2.0, 0.5, 0.0]
    weighted = [w * update(each.tensors) for w, each in zip(weights, loras, strict=True) if w]
    expected = ties_by_hand(weighted, density)
    combined = combine(loras, Weights(weights), Method("ties", rank=5, density=density))
    torch.testing.assert_close(update(combined.tensors), expected, atol=1e-5, rtol=1e-4)
    pruned = combine(loras, Weights(weights), Method("magnitude_prune", rank=5, density=density))
    expected = sum(keep_largest(each, density) for each in weighted)
    torch.testing.assert_close(update(pruned.tensors), expected, atol=1e-5, rtol=1e-4)


def test_a_large_layer_is_decomposed_as_well_without_all_of_it() -> None:
    """Half of the values dropped at random is near the flattest spectrum that there is."""
    loras = [lora(seed, rank=4, shape=(160, 120)) for seed in (1, 2)]
    method = Method("dare_linear", rank=6, density=0.5)
    dense = merge([update(each.tensors) for each in loras], method, LAYER)
    least = float(torch.linalg.svdvals(dense.double())[6:].norm())
    combined = combine(loras, Weights([1.0, 1.0]), method)
    error = float((update(combined.tensors) - dense).norm())
    assert least * 0.9999 < error < least * 1.001
    assert combined.lost == pytest.approx(error / float(dense.norm()), rel=1e-4)


def test_dare_by_hand() -> None:
    """Every value is dropped or divided by the density, the kept share is the density, and the mean is the update's."""
    updates = [torch.randn(40, 50, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    found = merge(updates, Method("dare_linear", density=0.25, seed=7), LAYER)
    choices = torch.stack([4 * (a * updates[0] + b * updates[1]) for a in (0, 1) for b in (0, 1)])
    off, which = (found - choices).abs().min(0)
    assert float(off.max()) < 1e-5
    shares = [float((which == n).float().mean()) for n in range(4)]
    assert shares == pytest.approx([0.5625, 0.1875, 0.1875, 0.0625], abs=0.04)
    assert not torch.equal(found, merge(updates, Method("dare_linear", density=0.25, seed=8), LAYER))
    assert not torch.equal(found, merge(updates, Method("dare_linear", density=0.25, seed=7), "unet.other"))

    elected = merge(updates, Method("dare_ties", density=0.25, seed=7), LAYER)
    a, b = ((which >> 1) & 1) * 4 * updates[0], (which & 1) * 4 * updates[1]  # what the same seed left of each
    agree, stronger = a * b > 0, torch.where(a.abs() >= b.abs(), a, b)
    torch.testing.assert_close(elected, torch.where(agree, (a + b) / 2, stronger))


def test_blocks_have_weights_of_their_own() -> None:
    """The longest prefix counts, up to a dot; a block of weight 0 is left out."""
    names = ["unet.down.0.to_q", "unet.down.1.to_q", "unet.downer.to_q", "unet.up.to_q"]
    loras = []
    for seed in (1, 2):
        layers = [lora(10 * seed + number, layer=name) for number, name in enumerate(names)]
        loras.append(LoraWeights({k: v for each in layers for k, v in each.tensors.items()}, layers[0].config, {}))
    blocks = {"unet.down": [0.3, 0.3], "unet.down.1": [1.0, 0.0], "unet.up": [0.0, 0.0]}
    combined = combine(loras, Weights([2.0, 1.0], blocks), Method("cat")).tensors
    for name, (first, second) in zip(names, [(0.6, 0.3), (2.0, 0.0), (2.0, 1.0)], strict=False):
        expected = first * update(loras[0].tensors, name) + second * update(loras[1].tensors, name)
        torch.testing.assert_close(update(combined, name), expected)
    assert not any(key.startswith("unet.up") for key in combined)


def test_blocks_are_read_from_options_and_files(tmp_path: Path) -> None:
    file = tmp_path / "blocks.yaml"
    file.write_text("unet.down_blocks: 0.3\nunet.mid_block: [1, 0.5]\n")
    assert read_blocks([str(file), "unet.up_blocks=0.2,2"]) == {
        "unet.down_blocks": [0.3], "unet.mid_block": [1.0, 0.5], "unet.up_blocks": [0.2, 2.0],
    }  # fmt: skip


def test_a_soup_is_the_mean_of_the_models(family, registry: Registry) -> None:
    """Of a weight that one has not moved its mean is with the base's."""
    fused = fuse(registry, [("early", 3.0), ("late", 1.0)], name="soup", blocks={"unet.down_blocks.2": [1.0, 9.0]})
    start, early, late = (weights_with(family, registry, *use) for use in ((), [("early", 1.0)], [("late", 1.0)]))
    shares = {name: (0.25, 0.75) if name.startswith("unet.down_blocks.2") else (0.75, 0.25) for name in start}
    mean = {name: a * early[name] + b * late[name] for name, (a, b) in shares.items()}
    assert furthest(weights_with(family, registry, (str(fused), 1.0)), mean) < 1e-6
    assert furthest(start, mean) > 1e-2
    assert registry.show("soup").kind == "delta"


def test_updates_of_whole_weights_combine_too() -> None:
    base, rng = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2)
    moves = [torch.randn(4, 5, generator=rng) for _ in range(2)]
    deltas = [{"unet.w": base + move} for move in moves]
    found = soup(deltas, {"unet.w": base}, Weights([1.0, 0.5]), Method("ties", density=0.5))["unet.w"]
    torch.testing.assert_close(found, base + ties_by_hand([moves[0], 0.5 * moves[1]], 0.5), atol=1e-5, rtol=1e-4)


def test_the_card_says_of_what_and_how_and_the_same_seed_makes_the_same_bytes(registry: Registry) -> None:
    def once(name: str, seed: int) -> Card:
        return fuse_adapters(str(registry.store.root), ["wide@v1:0.7", "tall"], name, "dare_ties", rank=6, density=0.4,
                             blocks=["unet.down_blocks=0.5"], seed=seed)  # fmt: skip

    first, again, other = once("one", 3), once("two", 3), once("three", 4)
    assert first.files == again.files
    assert first.files.keys() == other.files.keys() and first.files != other.files
    fusion = registry.show("one").lineage.fusion
    assert fusion is not None and 0 < fusion.lost < 1
    assert fusion.model_dump(exclude={"lost"}) == {
        "method": "dare_ties", "adapters": ["wide@v1", "tall@v1"], "weights": [0.7, 1.0], "rank": 6, "density": 0.4,
        "blocks": {"unet.down_blocks": [0.5, 0.5]}, "seed": 3,
    }  # fmt: skip
    assert first.tuner == {"type": "lora", "rank": 6, "alpha": 6, "dora": False, "rslora": False}
    assert first.base == registry.show("wide").base


def test_a_fused_adapter_is_read_as_any_other(family, registry: Registry) -> None:
    """PEFT's files and diffusers' say the same, and it can be fused again."""
    fused = fuse(registry, [("wide", 1.0), ("tall", 1.0)], "svd", name="again", rank=2)
    folder = registry.fetch(str(fused))
    stored, _ = read_safetensors(folder / "pytorch_lora_weights.safetensors")
    unet = family.load("unet", torch.float32)
    apply({"unet": unet, "text_encoder": family.load("text_encoder", torch.float32)}, folder)
    layer = unet.get_submodule(TO_Q)
    torch.testing.assert_close(layer.get_delta_weight("default"), update(stored, f"unet.{TO_Q}"))
    assert layer.lora_A["default"].weight.shape[0] == 2
    twice = fuse(registry, [(str(fused), 0.5), ("wide", 1.0)], name="twice")
    both = weights_with(family, registry, (str(fused), 0.5), ("wide", 1.0))
    assert furthest(weights_with(family, registry, (str(twice), 1.0)), both) < 1e-5


def test_the_command_says_what_it_made_and_what_the_rank_lost(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GTL_REGISTRY", str(registry.store.root))
    fuse_them = ["gtl", "adapters", "fuse", "wide:0.7", "tall@v1", "--name", "typed"]
    for arguments in ([], ["--method", "svd", "--rank", "1"], ["--method", "svd", "--rank", "1", "--json"]):
        monkeypatch.setattr(sys, "argv", [*fuse_them, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    plain, low, as_json = capsys.readouterr().out.splitlines()
    versions, lost = registry.versions("typed"), json.loads(as_json)["lost"]
    assert plain == f"adapter typed@{versions[0]}"
    assert low == f"adapter typed@{versions[1]}  ({lost:.1%} of the update is lost to the rank)"
    assert 0.3 < lost < 1 and json.loads(as_json)["adapter"] == f"typed@{versions[2]}"


@pytest.mark.parametrize(
    ("adapters", "arguments", "message"),
    [
        ("wide tall", {"method": "slerp"}, r"--method: 'slerp': expected one of linear, cat, svd, ties, "),
        ("wide", {}, r"fuse: 1 adapter; expected two or more"),
        ("wide wide@v1:0.5", {}, r"adapter wide@v1: is given twice"),
        ("wide nobody", {}, r"adapter 'nobody': not in the registry "),
        ("wide tall:x", {}, r"adapter 'tall:x': the part after ':' is its scale"),
        ("wide other", {}, r"adapter other@v1: is for builtin:tiny \(000000000000\), and wide@v1 for builtin:tiny"),
        ("dora wide", {}, r"adapter dora@v1: it is a DoRA"),
        ("wide early", {}, r"adapter early@v1: is a delta, and wide@v1 a lora; only adapters of one kind"),
        ("early late", {"method": "svd"}, r"--method svd: is for LoRAs; early@v1 is a delta"),
        ("early late", {"method": "ties", "rank": 4}, r"--rank 4: is for LoRAs; early@v1 is a delta"),
        ("early:1 late:-1", {}, r"weights: in unet.* they add up to 0; a mean divides by their sum"),
        ("early late", {"blocks": ["unet.conv_out=0.3"]}, r"--blocks: unet.conv_out=0.3: changes nothing in a mean"),
        (
            "wide tall",
            {"method": "svd", "rank": 10},
            r"--rank: 10: is more than any layer's update can have; at most 9",
        ),
        ("wide tall", {"method": "svd", "rank": 0}, r"--rank: 0: expected 1 or more"),
        ("wide tall", {"method": "cat", "rank": 3}, r"--rank 3: cat keeps the whole sum; use --method svd"),
        ("wide tall", {"method": "ties", "density": 0.0}, r"--density: 0: expected a number above 0 and at most 1"),
        ("wide tall", {"method": "dare_ties", "density": 1.5}, r"--density: 1.5: expected a number above 0"),
        ("wide tall", {"density": 0.5}, r"--density 0.5: linear drops nothing; only ties, "),
        ("wide:0 tall:0", {}, r"weights: nothing is left of the adapters"),
        (
            "wide tall",
            {"blocks": ["unet.cellar=1"]},
            r"--blocks: unet.cellar: no layer .*text_encoder.*unet.down_blocks",
        ),
        ("wide tall", {"blocks": ["unet=1,2,3"]}, r"--blocks: unet: 3 factors; expected one, or one for each of 2"),
        ("wide tall", {"blocks": ["unet=high"]}, r"--blocks unet=high: unet: expected a number"),
        ("wide tall", {"blocks": ["unet=1", "unet=2"]}, r"--blocks unet=2: unet: is given twice"),
        ("wide tall", {"blocks": ["nowhere.yaml"]}, r"blocks nowhere.yaml: No such file or directory"),
        ("wide tall", {"name": "New"}, r"--name: 'New': a name starts with a-z"),
    ],
)
def test_one_line_says_what_is_wrong(registry: Registry, adapters: str, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        fuse_adapters(str(registry.store.root), adapters.split(), **{"name": "new", **arguments})
    assert "\n" not in str(caught.value)
    assert registry.versions("new") == ()


def test_a_version_that_exists_stays(registry: Registry) -> None:
    before = registry.show("wide@v1")
    with pytest.raises(UserError, match=r"^adapter wide@v1: already published in "):
        fuse(registry, [("wide", 1.0), ("tall", 1.0)], name="wide", version="v1")
    assert registry.show("wide@v1") == before
