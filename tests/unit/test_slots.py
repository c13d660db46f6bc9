"""Slots: many LoRAs in one forward pass of a layer, against PEFT; what is refused; memory that stays where it is."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gtl.adapters import Card, apply
from gtl.adapters.card import Base, File
from gtl.adapters.delta import write_delta
from gtl.adapters.formats import LoraExport, write_lora
from gtl.adapters.sharing import fits
from gtl.adapters.slot_layers import Way, way_of
from gtl.adapters.slots import Slots
from gtl.types import UserError
from tests.loras import close, random_lora

IMAGE, TOKENS = (6, 9, 9), (5, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 10), TOKENS),
    "linear-of-vectors": (lambda: nn.Linear(6, 10, bias=False), (6,)),
    "linear-of-frames": (lambda: nn.Linear(6, 10), (3, *TOKENS)),
    "conv-3x3": (lambda: nn.Conv2d(6, 10, 3, padding=1), IMAGE),
    "conv-1x1": (lambda: nn.Conv2d(6, 10, 1), IMAGE),
    "conv-1x1-strided": (lambda: nn.Conv2d(6, 10, 1, stride=2), IMAGE),
    "conv-strided": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False), IMAGE),
    "conv-3x2": (lambda: nn.Conv2d(6, 10, (3, 2), padding="same"), IMAGE),
}
BATCHES = {
    "mixed": ([1, 0, 2, 1, 3, 0], [1.0, 1.0, 0.5, -2.0, 1.0, 1.0]),
    "gathered runs": ([3, 3, 1, 1, 0, 0], [1.0] * 6),
    "consecutive": ([1, 1, 2, 2, 3, 3], [1.0, 1.0, 0.3, 0.3, 2.0, 2.0]),
    "one": ([2] * 6, [1.0] * 6),
    "base": ([0] * 6, [1.0] * 6),
}


class Net(nn.Module):
    """One layer, by name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def net(kind: str = "linear") -> tuple[Net, Tensor]:
    """A net, and six rows for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make, shape = LAYERS[kind]
        return Net(make()), torch.randn(6, *shape)


def write(part: nn.Module, folder: Path, rank: int, alpha: float, seed: int, **flags: bool) -> Path:
    """A LoRA of the whole part."""
    tensors = random_lora(part, "unet", rank=rank, seed=seed, dora=flags.get("dora", False))
    write_lora(tensors, folder, config=LoraExport(rank=rank, alpha=alpha, **flags))
    return folder


@pytest.mark.parametrize(
    ("slots", "scales", "way"),
    [
        ([1, 2, 3], [1, 1, 1], Way(1, 1)),
        ([1, 1, 2, 2], [1, 1, 1, 1], Way(2, 1)),
        ([0, 1, 2], [1, 1, 1], Way(1, 0)),
        ([4, 4, 4], [2, 2, 2], Way(3, 4)),
        ([2, 2, 1, 1], [1, 1, 1, 1], Way(2, None)),
        ([1, 1, 3, 3], [1, 1, 1, 1], Way(2, None)),
        ([1, 2, 1, 2], [1, 1, 1, 1], Way(1, None)),
        ([1, 1, 2], [1, 1, 1], Way(1, None)),
        ([1, 1, 1, 1, 2, 2], [1] * 6, Way(2, None)),
        ([1, 1, 1, 1], [1, 1, 2, 2], Way(2, None)),
    ],
)
def test_a_batch_is_cut_into_the_longest_equal_runs(slots: list[int], scales: list[float], way: Way) -> None:
    assert way_of(slots, scales) == way


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_row_is_what_peft_makes_of_it_alone(kind: str, batch: str, steady: bool, tmp_path: Path) -> None:
    """Ranks 4, 2 and 1, rsLoRA, scales: equal to 1e-5 of the largest value; rows of slot 0 to the last bit."""
    part, x = net(kind)
    folders = [
        write(part, tmp_path / "a", 4, 6.0, 1), write(part, tmp_path / "b", 2, 1.0, 2),
        write(part, tmp_path / "c", 1, 3.0, 3, rslora=True),
    ]  # fmt: skip
    base = part(x)
    slotted = copy.deepcopy(part)
    slots = Slots("unet", slotted, ["layer"], 5, 4, steady=steady)
    for slot, folder in enumerate(folders, start=1):
        slots.load(slot, [(folder, 1.0)])
    taken, scales = BATCHES[batch]
    slots.assign(taken, scales)
    with torch.no_grad():
        y = slotted(x)
    assert torch.equal(slotted(x), y)  # with gradients, where nothing is changed in place
    for row, (slot, scale) in enumerate(zip(taken, scales, strict=True)):
        if slot == 0:
            assert torch.equal(y[row], base[row])
            continue
        alone = copy.deepcopy(part)
        apply({"unet": alone}, folders[slot - 1], scale=scale)
        assert close(y[row], alone(x[row : row + 1])[0])
        assert not close(y[row], base[row], 1e-3)


@pytest.mark.parametrize("kind", ["linear", "conv-1x1", "conv-3x3"])
def test_bf16_as_peft_does_it(kind: str, tmp_path: Path) -> None:
    """A bf16 base draws with bf16 adapters, and trains fp32 ones under autocast: equal to two bits of bf16."""
    part, x = net(kind)
    folder = write(part, tmp_path, 4, 6.0, 1)
    part.bfloat16()
    alone = copy.deepcopy(part)
    apply({"unet": alone}, folder)
    drawing, training = copy.deepcopy(part), copy.deepcopy(part)
    slots, trained = Slots("unet", drawing, ["layer"], 2, 4), Slots("unet", training, ["layer"], 2, 4, trainable=True)
    for each in (slots, trained):
        each.load(1, [(folder, 1.0)])
        each.assign([1, 1, 1, 0, 0, 0])
    with torch.no_grad():
        expected, drawn = alone(x.bfloat16()), drawing(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        learning = training(x)
    learning.float().square().sum().backward()
    assert drawn.dtype == learning.dtype == slots.weights.dtype == torch.bfloat16
    assert close(drawn[:3], expected[:3], 2**-7) and torch.equal(learning, drawn)
    assert torch.equal(drawn[3:], part(x.bfloat16())[3:])
    assert trained.weights.dtype == trained.grads.dtype == torch.float32
    assert trained.grads[1].any() and not trained.grads[0].any()


def test_several_in_one_slot_add_up(tmp_path: Path) -> None:
    part, x = net("conv-3x3")
    first, second = write(part, tmp_path / "a", 3, 6.0, 1), write(part, tmp_path / "b", 1, 1.0, 2)
    both = copy.deepcopy(part)
    apply({"unet": both}, first, "a", 0.5)
    apply({"unet": both}, second, "b", -2.0)
    slots = Slots("unet", part, ["layer"], 2, 4)
    slots.load(1, [(first, 0.5), (second, -2.0)])
    slots.assign([1] * 6)
    assert close(part(x), both(x))
    assert slots.export(1)["unet.layer.lora_A.weight"].shape[0] == 4


def test_ranks_above_the_slots_are_refused(tmp_path: Path) -> None:
    part, x = net()
    first, second = write(part, tmp_path / "a", 3, 6.0, 1), write(part, tmp_path / "b", 2, 1.0, 2)
    slots = Slots("unet", part, ["layer"], 2, 4)
    slots.load(1, [(first, 1.0)])
    slots.assign([1] * 6)
    before = part(x)
    with pytest.raises(UserError) as caught:
        slots.load(1, [(first, 1.0), (second, 1.0)])
    assert str(caught.value) == f"{first} + {second}: rank 5 in unet.layer: the slots hold at most 4"
    assert torch.equal(part(x), before)


def test_a_layer_without_slots_is_refused(tmp_path: Path) -> None:
    part = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    folder = write(part, tmp_path, 2, 2.0, 1)
    with pytest.raises(UserError) as caught:
        Slots("unet", part, ["0"], 2, 4).load(1, [(folder, 1.0)])
    assert str(caught.value) == f"{folder}: unet.1: it has no slots here; 1 other layers have"


def test_what_cannot_have_slots_is_refused_and_nothing_changes() -> None:
    part = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=2), nn.LayerNorm(4))
    for target, kind in (("1", "2 groups"), ("2", "LayerNorm")):
        with pytest.raises(UserError, match=rf"^unet\.{target}: {kind}: linear layers and convolutions without groups"):
            Slots("unet", part, ["0", target], 2, 4)
    assert type(part[0]) is nn.Linear


def test_dora_and_deltas_say_why(tmp_path: Path) -> None:
    part, _ = net()
    slots = Slots("unet", copy.deepcopy(part), ["layer"], 2, 4)
    write_delta({"unet.layer.weight": part.layer.weight}, tmp_path / "delta")
    reasons = {
        write(part, tmp_path / "dora", 2, 2.0, 1, dora=True): "it is a DoRA, which rescales whole weights of the base",
        tmp_path / "delta": "it is a delta, which replaces weights of the base",
    }
    for folder, reason in reasons.items():
        assert fits(folder) == reason
        with pytest.raises(UserError) as caught:
            slots.load(1, [(folder, 1.0)])
        assert str(caught.value) == f"{folder}: {reason}; it needs a forward pass of its own"
    assert fits(write(part, tmp_path / "plain", 2, 2.0, 1)) is None
    (tmp_path / "plain" / "adapter_config.json").write_text("[")
    with pytest.raises(UserError, match=r"adapter_config\.json: not readable as JSON"):
        fits(tmp_path / "plain")
    with pytest.raises(UserError, match="no adapter in it"):
        fits(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"kind": "delta"}, "it is a delta, which replaces weights of the base"),
        ({"tuner": {"type": "lora", "dora": True}}, "it is a DoRA, which rescales whole weights of the base"),
        ({"files": {"text_encoder/adapter_config.json": File(sha256="", bytes=0)}}, None),
    ],
)
def test_a_card_says_the_same(changes: dict, reason: str | None) -> None:
    file = {"adapter_config.json": File(sha256="", bytes=0)}
    values = {"kind": "lora", "tuner": {"type": "lora", "dora": False}, "files": file, **changes}
    base = Base(source="builtin:tiny", fingerprint="0", family="sd")
    assert fits(Card(name="dog", version="v1", base=base, **values)) == reason


def test_all_rows_of_any_batch_take_one_slot(tmp_path: Path) -> None:
    part, x = net("conv-3x3")
    slots = Slots("unet", part, ["layer"], 3, 4)
    slots.load(2, [(write(net("conv-3x3")[0], tmp_path / "a", 4, 6.0, 1), 1.0)])
    slots.assign([2] * 6, [0.5] * 6)
    expected = part(x)
    slots.assign_all(2, 0.5)
    assert torch.equal(part(x), expected)
    assert close(part(x[:1]), expected[:1])
    slots.assign([1, 2])
    with pytest.raises(ValueError, match="6 rows came, 2 are assigned"):
        part(x)


def test_nothing_is_read_for_a_batch_of_another_size() -> None:
    part, x = net()
    slots = Slots("unet", part, ["layer"], 3, 4)
    with pytest.raises(ValueError, match=r"^unet\.layer: 6 rows came, 0 are assigned"):
        part(x)
    slots.assign([1, 2])
    with pytest.raises(ValueError, match=r"^unet\.layer: 6 rows came, 2 are assigned; a layer whose first dimension"):
        part(x)
    for wrong in ([], [3], [-1]):
        with pytest.raises(ValueError, match="each from 0 to 2"):
            slots.assign(wrong)


def test_loading_and_evicting_keeps_all_memory_where_it_is(tmp_path: Path) -> None:
    """200 turns: the same storage, no tensor more, and an empty slot is the base."""
    part, x = net("conv-3x3")
    folder = write(part, tmp_path, 4, 6.0, 1)
    base = part(x)
    slots = Slots("unet", part, ["layer"], 4, 4, steady=True)

    def turn(slot: int) -> Tensor:
        slots.load(slot, [(folder, 1.0)])
        slots.assign([slot, 0, 1, 2, 3, 1])
        y = part(x)
        slots.evict(slot)
        return y

    def addresses() -> list[int]:
        layer = part.layer
        return [each.data_ptr() for each in (slots.weights, layer.a, layer.b, layer.rows.index, layer.rows.scale)]

    def count() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    turn(1)
    before, tensors = addresses(), count()
    for cycle in range(200):
        turn(1 + cycle % 3)
    assert addresses() == before and count() == tensors
    assert torch.equal(part(x), base) and not slots.weights.any()
    with pytest.raises(ValueError, match="^slot 0: expected 1 to 3; slot 0 is the base$"):
        slots.load(0, [(folder, 1.0)])


def test_one_graph_serves_every_assignment(tmp_path: Path) -> None:
    """Dynamo traces once, whatever is loaded and assigned, at whichever scales."""
    from torch._dynamo.testing import CompileCounter

    part = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Flatten(2), nn.Linear(81, 5))
    part.requires_grad_(False)
    folders = [write(part, tmp_path / str(seed), 2 + seed, 3.0, seed) for seed in (1, 2)]
    slots = Slots("unet", part, ["0", "1", "3"], 3, 4, steady=True)
    counter = CompileCounter()
    compiled = torch.compile(part, backend=counter, fullgraph=True)
    x = torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for turn, taken in enumerate(([0, 0, 0, 0], [1, 2, 0, 1], [2, 2, 2, 2], [1, 1, 2, 2])):
            slots.load(1 + turn % 2, [(folders[turn % 2], 1.0)])
            slots.assign(taken, [1.0, 0.5 + turn, 1.0, 2.0])
            assert torch.equal(compiled(x), part(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["linear", "conv-3x3"])
def test_gradients_in_one_pass_are_those_of_each_trial_alone(kind: str) -> None:
    (part, x), (bare, _) = net(kind), net(kind)
    loras = [random_lora(part, "unet", rank=rank, seed=rank) for rank in (4, 1, 2)]
    slots = Slots("unet", part, ["layer"], 4, 4, trainable=True)
    for slot, lora in enumerate(loras, start=1):
        slots.put(slot, slots.stack(lora))
    slots.assign([1, 1, 2, 2, 3, 3])
    part(x).square().unflatten(0, (3, 2)).flatten(1).mean(1).sum().backward()
    for slot, lora in enumerate(loras, start=1):
        mine = {name: nn.Parameter(tensor.clone()) for name, tensor in lora.items()}
        down, up = mine["unet.layer.lora_A.weight"], mine["unet.layer.lora_B.weight"]
        rows = x[2 * slot - 2 : 2 * slot]
        own = rows @ down.T @ up.T if kind == "linear" else nn.functional.conv2d(
            nn.functional.conv2d(rows, down, padding=1), up
        )  # fmt: skip
        (bare(rows) + own).square().mean().backward()
        gradient = slots.parameter(slot).grad
        assert gradient is not None
        packed = slots.named(slot, gradient)
        assert packed.keys() == mine.keys()
        for name, parameter in mine.items():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0
            assert close(packed[name], parameter.grad, 1e-6), name


def test_trials_step_apart_and_padding_stays_zero() -> None:
    """Three ranks in slots of 4, each with its own AdamW, rate and clipping: as the same trials one by one."""
    part, _ = net("conv-3x3")
    x = torch.randn(6, *IMAGE, generator=torch.Generator().manual_seed(1))
    target = torch.randn(6, 10, 9, 9, generator=torch.Generator().manual_seed(2))
    ranks, rates = (4, 1, 2), (1e-2, 3e-3, 1e-1)
    loras = [random_lora(part, "unet", rank=rank, seed=rank) for rank in ranks]
    alone = []
    for member, (lora, rate) in enumerate(zip(loras, rates, strict=True)):
        rows = slice(2 * member, 2 * member + 2)
        parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in lora.items()}
        optimizer = torch.optim.AdamW(parameters.values(), rate, fused=True)
        for _ in range(5):
            down = nn.functional.conv2d(x[rows], parameters["unet.layer.lora_A.weight"], padding=1)
            y = part(x[rows]) + nn.functional.conv2d(down, parameters["unet.layer.lora_B.weight"])
            (y - target[rows]).square().mean().backward()
            nn.utils.clip_grad_norm_(parameters.values(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        alone.append(parameters)

    slots = Slots("unet", part, ["layer"], 4, 4, trainable=True)
    for slot, lora in enumerate(loras, start=1):
        slots.put(slot, slots.stack(lora))
    optimizers = [torch.optim.AdamW([slots.parameter(1 + k)], rate, fused=True) for k, rate in enumerate(rates)]
    for _ in range(5):
        slots.assign([1, 1, 2, 2, 3, 3])
        (part(x) - target).square().unflatten(0, (3, 2)).flatten(1).mean(1).sum().backward()
        for slot, optimizer in enumerate(optimizers, start=1):
            nn.utils.clip_grad_norm_([slots.parameter(slot)], 0.5)
            optimizer.step()
            optimizer.zero_grad()  # takes .grad away, and the next `assign` gives it back
        slots.grads.zero_()
    for slot, parameters in enumerate(alone, start=1):
        mine = slots.export(slot)
        assert mine.keys() == parameters.keys()
        assert all(close(mine[name], value, 1e-5) and mine[name].is_contiguous() for name, value in parameters.items())
        assert int(slots.weights[slot].count_nonzero()) == sum(tensor.numel() for tensor in mine.values())
        moments = optimizers[slot - 1].state[slots.parameter(slot)]["exp_avg_sq"]
        assert slots.named(slot, moments).keys() == mine.keys()
        assert torch.equal(slots.stack(slots.named(slot, moments)).values, moments)
    assert not slots.weights[0].any()


@pytest.mark.parametrize("kind", ["linear", "conv-1x1", "conv-3x3"])
def test_a_trial_that_diverges_does_so_alone(kind: str) -> None:
    part, x = net(kind)
    loras = [random_lora(part, "unet", rank=rank, seed=rank) for rank in (1, 2, 3)]
    slots = Slots("unet", part, ["layer"], 4, 4, trainable=True)
    gradients = []
    for broken in (1.0, float("inf")):
        for slot, lora in enumerate(loras, start=1):
            slots.put(slot, slots.stack({n: v * (broken if slot == 2 else 1) for n, v in lora.items()}))
        slots.assign([1, 1, 2, 2, 3, 3])
        part(x).square().sum().backward()
        gradients.append(slots.grads.clone())
    assert gradients[1][2].isnan().any()
    assert torch.equal(gradients[1][[0, 1, 3]], gradients[0][[0, 1, 3]])
    slots.evict(2)
    slots.assign([1, 1, 2, 2, 3, 3])
    part(x).square().sum().backward()
    assert slots.grads.isfinite().all() and not slots.grads[2].any()


def test_slots_for_serving_are_no_parameters() -> None:
    part, _ = net()
    slots = Slots("unet", part, ["layer"], 3, 4)
    with pytest.raises(ValueError, match="^these slots are not trained$"):
        slots.parameter(1)
    assert [name for name, _ in part.named_parameters()] == ["layer.base_layer.weight", "layer.base_layer.bias"]
    assert part.layer.weight is part.layer.base_layer.weight and part.layer.bias is part.layer.base_layer.bias
