"""Slots in real models: rows of a mixed batch as plain PEFT draws each alone, packed trials as each trains alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtl.adapters import apply
from gtl.adapters.formats import LoraExport, write_lora
from gtl.adapters.slots import Slots
from gtl.config.tuners import LoraTuner
from gtl.families import open_family
from gtl.tuners import make_tuner
from gtl.types import Geometry
from tests.contract.test_families import FIRST, MODELS
from tests.loras import close

SIZE = (64, 64)
PROMPTS = ["a photo of a dog", "red boat", "", "a large tree and a small house"]
"""Of different lengths, which some families pad."""


class Model:
    """A tiny model, its prompts' conditions and a batch of four for it."""

    def __init__(self, folder: Path | str) -> None:
        self.family: Any = open_family(str(folder))
        self.part: str = self.family.main
        encoders = {part: self.family.load(part) for part in self.family.encoders}
        more = {
            **self.family.size_conditions(Geometry(SIZE, (0, 0), SIZE)),
            **self.family.guidance_conditions(3.5),
        }
        rng = torch.Generator().manual_seed(1)
        picture = torch.randn(self.family.latent_shape(*SIZE), generator=rng)
        self.conditions = [
            {**each, **more, **self.family.picture_conditions(picture, rng)}
            for each in self.family.encode_prompts(encoders, PROMPTS)
        ]
        rng = torch.Generator().manual_seed(0)
        self.noisy = torch.randn(4, *self.family.latent_shape(*SIZE), generator=rng)
        self.target = torch.randn(self.noisy.shape, generator=rng)
        self.t = self.family.path.time(torch.tensor([0.05, 0.3, 0.6, 0.95]))

    def load(self, dtype: torch.dtype | None = None) -> nn.Module:
        module: nn.Module = self.family.load(self.part, dtype)
        return module

    def predict(self, main: nn.Module, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        """The model's output for some of the rows, of which all are padded alike."""
        conditions: Mapping[str, Tensor] = self.family.collate(self.conditions)
        cast = {n: v[rows].to(dtype) if v.is_floating_point() else v[rows] for n, v in conditions.items()}
        prediction: Tensor = self.family.predict(main, self.noisy[rows].to(dtype), self.t[rows], cast)
        return prediction[:, : self.target.shape[1]]


@pytest.fixture(scope="module")
def model_of(written: Callable[[str], Path]) -> Callable[[str], Model]:
    return lambda name: Model(written(name) if name in MODELS else name)


def write(main: nn.Module, part: str, targets: list[str], rank: int, alpha: float, seed: int, folder: Path) -> Path:
    """A LoRA of these layers whose effect is as large as the base's output."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for target in targets:
        out, *given = main.get_submodule(target).weight.shape
        width = torch.Size(given).numel()
        tensors[f"{part}.{target}.lora_A.weight"] = torch.randn(rank, *given, generator=rng) / width**0.5
        ones = (1,) * (len(given) - 1)
        tensors[f"{part}.{target}.lora_B.weight"] = 0.3 * torch.randn(out, rank, *ones, generator=rng) / rank**0.5
    write_lora(tensors, folder, config=LoraExport(rank=rank, alpha=alpha))
    return folder


@pytest.mark.parametrize("name", FIRST.values())
def test_a_mixed_batch_is_each_request_alone(name: str, model_of: Callable[[str], Model], tmp_path: Path) -> None:
    """Rows: an adapter, the base, another adapter at half its scale, and both at once. 1e-5 of the largest value."""
    model = model_of(name)
    main, part = model.load(), model.part
    every = model.family.lora_targets(main, "all-linear+conv")
    some = model.family.lora_targets(main, "attention")
    first = write(main, part, every, 4, 6.0, 1, tmp_path / "first")
    second = write(main, part, some, 2, 1.0, 2, tmp_path / "second")
    with torch.no_grad():
        whole = model.predict(main)
        expected = []
        for row, adapters in enumerate(([(first, 1.0)], [], [(second, 0.5)], [(first, 1.0), (second, -1.0)])):
            alone = model.load()
            for number, (folder, scale) in enumerate(adapters):
                apply({part: alone}, folder, str(number), scale)
            expected.append(model.predict(alone, slice(row, row + 1))[0])
        slots = Slots(part, main, every, 4, 6)
        slots.assign([0] * 4)
        assert torch.equal(model.predict(main), whole)
        slots.load(1, [(first, 1.0)])
        slots.load(2, [(second, 1.0)])
        slots.load(3, [(first, 1.0), (second, -1.0)])
        slots.assign([1, 0, 2, 3], [1.0, 1.0, 0.5, 1.0])
        drawn = model.predict(main)
    for row in range(4):
        assert close(drawn[row], expected[row])
        assert (row == 1) == close(drawn[row], whole[row], 1e-3)


TRIALS = (
    {"rank": 4},
    {"rank": 2, "alpha": 3.0, "freeze_depth": 0.5},
    {"rank": 3, "alpha": 2.0, "rslora": True, "freeze_depth": 1, "initialization": "gaussian"},
    {"rank": 8, "alpha": 1.0},
)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # In fp32 a gradient of the untrained UNets moves by more, when nothing but the batch becomes larger.
        ("builtin:tiny", torch.float32), ("sd3", torch.float32), ("flux-dev", torch.float32),
        ("sd", torch.float64), ("sdxl", torch.float64), ("sd3", torch.float64),
    ],
)  # fmt: skip
def test_a_packed_trial_has_the_gradients_it_has_alone(
    name: str, dtype: torch.dtype, model_of: Callable[[str], Model], tmp_path: Path
) -> None:
    """Its gradient as a whole to 1e-6; in fp64, where rounding is out of the way, every tensor of it to 1e-9."""
    model = model_of(name)
    shared, part = model.load(dtype), model.part
    targets = "all-linear+conv"
    slots = Slots(part, shared, model.family.lora_targets(shared, targets), 5, 8, trainable=True)
    solos, scales = [], []
    for member, changes in enumerate(TRIALS):
        main, config = model.load(dtype), LoraTuner(targets=targets, **changes)
        tuner = make_tuner(config, model.family)
        parameters = tuner.apply({part: main}, seed=member)
        rng = torch.Generator().manual_seed(member)
        for key, parameter in parameters.items():
            start = torch.randn(parameter.shape, generator=rng) * 0.01 if "lora_B" in key else parameter.detach()
            parameter.data = start.to(dtype)
        rows = slice(member, member + 1)
        loss = (model.predict(main, rows, dtype) - model.target[rows]).square().mean()
        loss.backward()
        solos.append((parameters, loss.item()))
        scales.append(LoraExport(config.rank, config.resolved_alpha, config.rslora).scale("", config.rank))
        slots.put(member + 1, slots.stack(parameters))
        packed = slots.export(member + 1)
        for where, tensors in (("alone", parameters), ("packed", packed)):
            tuner.export(tensors, tmp_path / where)
        for file in (tmp_path / "alone").iterdir():
            assert file.read_bytes() == (tmp_path / "packed" / file.name).read_bytes()

    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):  # slots in their own order, and not
        slots.grads.zero_()
        slots.assign([member + 1 for member in order], [scales[member] for member in order])
        noisy, target, t, conditions = model.noisy, model.target, model.t, model.conditions
        model.noisy, model.target, model.t = noisy[order], target[order], t[order]
        model.conditions = [conditions[member] for member in order]
        losses = (model.predict(shared, dtype=dtype) - model.target).square().flatten(1).mean(1)
        losses.sum().backward()
        model.noisy, model.target, model.t, model.conditions = noisy, target, t, conditions
        for row, member in enumerate(order):
            parameters, loss = solos[member]
            gradients = slots.named(member + 1, slots.grads[member + 1])
            assert gradients.keys() == parameters.keys()
            assert float(losses[row]) == pytest.approx(loss, rel=1e-6)
            apart = sum((gradients[n] - p.grad).square().sum() for n, p in parameters.items()) ** 0.5
            assert apart <= 1e-6 * sum(p.grad.square().sum() for p in parameters.values()) ** 0.5
            if dtype == torch.float64:
                assert all(close(gradients[n], p.grad, 1e-9) for n, p in parameters.items())
            owned = sum(int(each.count_nonzero()) for each in gradients.values())
            assert int(slots.grads[member + 1].count_nonzero()) == owned  # nothing in padding and frozen blocks
    assert not slots.grads[0].any()
