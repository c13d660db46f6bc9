"""Low-rank adapters: LoRA (Hu et al. 2021, arXiv 2106.09685), DoRA (2402.09353) and rsLoRA (2312.03732), by PEFT."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gtl.adapters.apply import fitting_lora, kind_of
from gtl.adapters.channels import add_channels, match_channels, split_channels, wide_in, write_channels
from gtl.adapters.formats import A, B, LoraExport, split_name, write_lora
from gtl.config.tuners import LoraTuner
from gtl.families import denoising
from gtl.families.targets import has_ending
from gtl.tuners.base import train_added, trained_parts
from gtl.tuners.depth import frozen_prefixes, is_under
from gtl.tuners.prompt import Prompt
from gtl.types import UserError

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from torch import Tensor, nn

    from gtl.families.base import Family

ADAPTER = "default"
"""PEFT's name of the adapter in training; it appears in no exported name."""
PRINCIPAL = ("pissa", "olora")
"""How initialisations begin that move a part of the base weight into the adapter."""


class Lora:
    """Low-rank adapters in the blocks behind the freeze depth, and in text encoders."""

    def __init__(self, config: LoraTuner, family: Family) -> None:
        """Nothing is loaded yet."""
        self.config = config
        self.family = family
        self.word = None if config.token is None else Prompt(config, denoising(family))
        self._initial: dict[str, Tensor] = {}
        """What the adapters started from, where that was taken out of the base weight."""

    def apply(self, parts: dict[str, nn.Module], seed: int, init: Path | None = None) -> dict[str, nn.Parameter]:
        """Freeze everything, put an fp32 adapter into every target, return the adapters' parameters.

        A layer's initial weights depend on the seed and on its name only: not on the process, the world size, the
        freeze depth or the other targets.

        Raises:
            UserError: no target is left, one can't carry the adapter, or `init` is of another rank or other layers.
        """
        for module in parts.values():
            module.requires_grad_(False)
        trainable: dict[str, nn.Parameter] = {}
        for part, target, layer in self._layers(parts):
            adapter = self._adapter(part, target, layer, seed)
            parts[part].set_submodule(target, adapter)
            trainable |= trained_of(adapter, f"{part}.{target}")
        if self.config.initialization.startswith(PRINCIPAL):
            self._initial = {key: value.detach().cpu().clone() for key, value in trainable.items()}
        if init is not None:
            self._continue_from(parts, trainable, init)
            if wide_in(parts):  # else there is no image to see, and what was learned of it is left behind
                add_channels(parts, match_channels(parts, init), 1.0)
        trainable |= train_added(parts)
        return trainable if self.word is None else trainable | self.word.add(parts, init)

    def initial(self, parts: dict[str, nn.Module], seed: int, init: Path | None = None) -> dict[str, nn.Parameter]:
        """What `apply` would return, of parts that stay as they are and may be on meta; in CPU memory.

        Not of what depends on the base's weights: DoRA, PiSSA and OLoRA.

        Raises:
            UserError: see `apply`.
        """
        trainable: dict[str, nn.Parameter] = {}
        for part, target, layer in self._layers(parts):
            blank = copy.deepcopy(layer).to_empty(device="cpu")
            trainable |= trained_of(self._adapter(part, target, blank, seed), f"{part}.{target}")
        if init is not None:
            self._continue_from(parts, trainable, init)
        return trainable

    def _layers(self, parts: dict[str, nn.Module]) -> Iterator[tuple[str, str, nn.Linear | nn.Conv2d]]:
        """The layers that get an adapter, with their parts and names."""
        for part, target in self.targets({name: parts[name] for name in trained_parts(self.config.train, list(parts))}):
            layer = cast("nn.Linear | nn.Conv2d", parts[part].get_submodule(target))
            self._check(target, layer)
            yield part, target, layer

    def _adapter(self, part: str, target: str, layer: nn.Linear | nn.Conv2d, seed: int) -> nn.Module:
        named = target if part == self.family.main else f"{part}.{target}"
        seed = zlib.crc32(named.encode(), seed)
        return adapt(layer, self._peft_config(), seed, random_b=self._random_b)

    def targets(self, parts: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
        """Parts and names of the layers in them that get an adapter, in order.

        Raises:
            UserError: an ending that `tuner.targets` lists is in none of the parts, or no layer is left.
        """
        found = []
        for part, module in parts.items():
            others = [other for name, other in parts.items() if name != part]
            endings = targets_of(self.config.targets, module, others)
            if not endings:
                continue
            find = self._main_targets if part == self.family.main else self.family.encoder_targets
            found += [(part, name) for name in find(module, endings)]
        return found

    def _main_targets(self, main: nn.Module, targets: str | Sequence[str]) -> list[str]:
        wanted = self.family.lora_targets(main, targets)
        frozen = frozen_prefixes(self.family, main, self.config.freeze_depth)
        left = [name for name in wanted if not is_under(name, frozen)]
        if not left:
            raise UserError(
                f"tuner.freeze_depth: {self.config.freeze_depth}: freezes all {len(wanted)} layers of tuner.targets "
                f"{targets!r}; freeze fewer of the {len(self.family.blocks(main))} blocks"
            )
        return left

    def export(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write the adapters as PEFT and as diffusers read them, for the base model as it was published.

        Weights of further input channels go into a file beside them.
        """
        added, tensors = split_channels(tensors)
        write_channels(added, folder)
        config = self.config
        if self.word is not None:
            vectors = {name: value for name, value in tensors.items() if ".lora_" not in name}
            self.word.export(vectors, folder)
            tensors = {name: value for name, value in tensors.items() if name not in vectors}
        export = LoraExport(config.rank, config.resolved_alpha, config.rslora, config.dora, config.dropout)
        if config.initialization.startswith(PRINCIPAL):
            tensors = relative(tensors, self._initial)
            export = LoraExport(2 * config.rank, config.scale * 2 * config.rank, False, config.dora, config.dropout)
        write_lora(tensors, folder, config=export)

    def _continue_from(self, parts: dict[str, nn.Module], trainable: dict[str, nn.Parameter], init: Path) -> None:
        """Set the adapters to a published LoRA's, whose scale may be another.

        Raises:
            UserError: it is of another rank or of other layers.
        """
        try:
            self._take(parts, trainable, init)
        except UserError as error:
            raise UserError(f"tuner.init: {self.config.init}: {error}") from None

    def _take(self, parts: dict[str, nn.Module], trainable: dict[str, nn.Parameter], init: Path) -> None:
        wanted = "lora" if self.word is None else "pivotal"
        if (kind := kind_of(init)) != wanted:
            named = "lora" if self.word is None else "lora with a word"
            raise UserError(f"it is a {kind}; {named} continues from a {wanted}")
        weights = fitting_lora(parts, init)
        if differing := sorted(weights.tensors.keys() ^ trainable.keys()):
            whose = "only it has" if differing[0] in weights.tensors else "it has not"
            raise UserError(
                f"its layers are not those of tuner.train, targets, freeze_depth and dora; {whose} {differing[0]}"
            )
        for name, parameter in trainable.items():
            value = weights.tensors[name]
            if value.shape != parameter.shape:
                layer = split_name(name)[0]
                rank = weights.tensors[f"{layer}.{A}"].shape[0]
                raise UserError(f"its rank is {rank} in {layer}; tuner.rank is {self.config.rank}")
        for name, parameter in trainable.items():
            layer, suffix = split_name(name)
            theirs = weights.config.scale(layer, self.config.rank) / self.config.scale
            parameter.data.copy_(weights.tensors[name] * (theirs if suffix == B else 1.0))

    @property
    def _random_b(self) -> bool:
        return self.config.initialization == "random_b"

    def _peft_config(self) -> LoraConfig:
        from peft import LoraConfig

        config = self.config
        return LoraConfig(
            r=config.rank,
            lora_alpha=config.resolved_alpha,  # type: ignore[arg-type]  # declared an int, taken as any number
            lora_dropout=config.dropout,
            target_modules=["layer"],
            use_dora=config.dora,
            use_rslora=config.rslora,
            init_lora_weights=cast(Any, self._random_b or config.initialization == "default" or config.initialization),
        )

    def _check(self, target: str, layer: nn.Linear | nn.Conv2d) -> None:
        from torch import nn

        from gtl.families.wide import WideConv2d

        if isinstance(layer, WideConv2d):
            raise UserError(f"tuner.targets: {target}: reads an image too, and learns that itself; leave it out")
        initialization, rank = self.config.initialization, self.config.rank
        if isinstance(layer, nn.Conv2d):
            if rank % layer.groups:
                raise UserError(f"tuner.rank: {rank}: {target} has {layer.groups} groups and needs a multiple of them")
            if initialization.startswith((*PRINCIPAL, "orthogonal")):
                raise UserError(
                    f"tuner.initialization: {initialization!r}: {target} is a convolution; take default or gaussian"
                )
        elif initialization.startswith(PRINCIPAL) and rank > (smaller := min(layer.weight.shape)):
            raise UserError(f"tuner.rank: {rank}: {initialization} takes at most rank {smaller} out of {target}")


def targets_of(targets: str | list[str], module: nn.Module, others: Sequence[nn.Module]) -> str | list[str]:
    """What of `tuner.targets` is meant for one of several parts: of listed endings those that only the others lack."""
    if isinstance(targets, str) or not others:
        return targets

    def has(part: nn.Module, ending: str) -> bool:
        return any(has_ending(name, [ending]) for name, _ in part.named_modules())

    return [ending for ending in targets if has(module, ending) or not any(has(other, ending) for other in others)]


def adapt(layer: nn.Linear | nn.Conv2d, config: LoraConfig, seed: int, *, random_b: bool = False) -> nn.Module:
    """The layer inside PEFT's adapter layer, with fp32 adapter weights whatever the layer's own dtype.

    With `random_b`, A is zero and B random instead of the other way round; PEFT has no name for it.

    The layer's weight stays what it is, perhaps mapped from a file, unless the initialisation takes a part out of it.
    """
    import torch
    from peft import inject_adapter_in_model

    # PEFT starts an adapter in the dtype of its layer and would round DoRA's norms and PiSSA's factors to bf16.
    stored = layer.weight.data
    layer.weight.data = stored.float()
    holder = torch.nn.ModuleDict({"layer": layer})
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU, wherever the layer is
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, holder, adapter_name=ADAPTER)
        if random_b:
            adapter = cast(Any, holder["layer"])
            torch.nn.init.zeros_(adapter.lora_A[ADAPTER].weight)
            b = adapter.lora_B[ADAPTER].weight
            torch.nn.init.normal_(b, std=b.shape[1] ** -0.5)  # of what an output sums over: a group's share
    if not str(config.init_lora_weights).startswith(PRINCIPAL):
        layer.weight.data = stored
    # Over a bf16 layer autocast picks the dtypes. PEFT's own cast of the input to fp32 would only make it keep a copy
    # for each adapter; DoRA needs the cast, since it takes the dtype of its weight norm from the input.
    cast("LoraLayer", holder["layer"]).cast_input_dtype_enabled = config.use_dora
    return holder["layer"]


def trained_of(adapter: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter layer's own parameters, by the names that checkpoints and files have."""
    return {
        f"{name}.{key.replace(f'.{ADAPTER}', '')}": parameter
        for key, parameter in adapter.named_parameters() if parameter.requires_grad
    }  # fmt: skip


def relative(tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters of rank 2r on the original base weight, from those of rank r on the base weight less `scale * B0 A0`.

    BA - B0 A0 = [B, -B0] [A; A0].
    """
    import torch

    stacked = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        if name.endswith(".lora_A.weight"):
            value = torch.cat([value, initial[name]], dim=0)
        elif name.endswith(".lora_B.weight"):
            value = torch.cat([value, -initial[name]], dim=1)
        stacked[name] = value
    return stacked
