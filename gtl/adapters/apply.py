"""The only reader that puts a published artefact onto a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gtl.adapters.card import Kind
from gtl.adapters.channels import add_channels, match_channels, wide_in
from gtl.adapters.delta import DELTA, apply_delta, moved_by_delta
from gtl.adapters.formats import MAIN_PARTS, PEFT_CONFIG, A, LoraExport, LoraWeights, layers_of, peft_config
from gtl.adapters.match import match
from gtl.adapters.read import read_peft
from gtl.adapters.words import EMBEDS, apply_word, moved_by_word
from gtl.types import UserError

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor, nn


def apply(parts: Mapping[str, nn.Module], folder: Path, name: str = "default", scale: float = 1.0) -> None:
    """Put an artefact onto a model's parts, in place, for inference.

    Calls with different names add up: all are active at once, each with its own scale. Only a delta that moves a weight
    which another delta has moved is refused. Nothing is trainable afterwards, and the artefact's tensors take the dtype
    and the device of the layers they are on. The model stays as it was when the artefact is refused. A DoRA is scaled
    as diffusers does it: the update, not the magnitude. A word has no scale but 1. One that was taught to edit images
    gives the input layer further channels, for those.

    Raises:
        UserError: a file is missing or damaged, a key matches no layer, or a layer stays without its weights.
    """
    channels = match_channels(parts, folder)
    reader = reader_of(folder)
    if channels and reader.kind == "lora":
        check_apart(folder, {f"{part}.{layer}" for part, layer, _ in channels}, reader.moved(parts, folder))
    reader.apply(parts, folder, name, scale)
    add_channels(parts, channels, scale)


def moved(parts: Mapping[str, nn.Module], folder: Path) -> set[str]:
    """Names `<part>.<parameter>` of the weights that an artefact changes; the parts may be on the meta device.

    Raises:
        UserError: it does not fit the parts, as for `apply`.
    """
    return reader_of(folder).moved(parts, folder)


def kind_of(folder: Path) -> Kind:
    """What kind of artefact lies in a folder.

    Raises:
        UserError: there is none.
    """
    return reader_of(folder).kind


def reader_of(folder: Path) -> Reader:
    """The reader of the artefact in a folder.

    Raises:
        UserError: there is none.
    """
    found = [m for m in READERS if (folder / m).is_file() or any(folder.glob(f"*/{m}"))]
    if not found:
        raise UserError(f"{folder}: no adapter in it; expected one of {', '.join(READERS)}")
    return PIVOTAL if {PEFT_CONFIG, EMBEDS} <= set(found) else READERS[found[0]]


def apply_lora(parts: Mapping[str, nn.Module], folder: Path, name: str, scale: float) -> None:
    """`apply` for LoRA, DoRA and rsLoRA in PEFT's files; linear and convolution layers."""
    adapter = adapter_key(name)
    for part, module in parts.items():
        if adapter in getattr(module, "peft_config", {}):
            raise ValueError(f"an adapter named {name!r} is on {part} already")
    weights = fitting_lora(parts, folder)
    check_apart(folder, wide_in(parts), {f"{layer}.weight" for layer in layers_of(weights.tensors)})
    for part, module in parts.items():
        own = {key: tensor for key, tensor in weights.tensors.items() if key.startswith(f"{part}.")}
        if own:
            _inject(module, part, own, weights.config, adapter)
            _activate(module, adapter, scale)


def moved_by_lora(parts: Mapping[str, nn.Module], folder: Path) -> set[str]:
    """`moved` for LoRA, DoRA and rsLoRA."""
    return {f"{layer}.weight" for layer in layers_of(fitting_lora(parts, folder).tensors)}


def fitting_lora(parts: Mapping[str, nn.Module], folder: Path) -> LoraWeights:
    """A LoRA in PEFT's files under the names of the model's own modules.

    Raises:
        UserError: a file is missing or damaged, it is for other parts too, or a key matches no layer.
    """
    weights = read_peft(folder, next((part for part in parts if part in MAIN_PARTS), None))
    missing = sorted({name.partition(".")[0] for name in weights.tensors} - set(parts))
    if missing:
        raise UserError(f"{folder}: it is for {', '.join(missing)} too; the parts given are {', '.join(parts)}")
    return match(weights, parts, folder)


def check_apart(folder: Path, wide: set[str], moved: set[str]) -> None:
    """Refuse a low-rank update of a layer `<part>.<layer>` that reads more channels than the update is of.

    Raises:
        UserError: it is one.
    """
    if both := sorted(layer for layer in wide if f"{layer}.weight" in moved):
        raise UserError(f"{folder}: it has a low-rank update of {both[0]}, which is to read an image too; take one")


def adapter_key(name: str) -> str:
    """The name PEFT's layers know an adapter by: names of modules cannot hold a dot."""
    return name.replace(".", "%2E")


def _inject(module: nn.Module, part: str, tensors: Mapping[str, Tensor], config: LoraExport, adapter: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    ranks = {layer: int(group[A].shape[0]) for layer, group in layers_of(tensors).items()}
    state = {}
    for key, tensor in tensors.items():
        own = key.partition(".")[2]
        weight = module.get_parameter(f"{own.rpartition('.lora_')[0]}.weight")
        state[own] = tensor.to(device=weight.device, dtype=weight.dtype)
    # On meta, so that no initial values are drawn; by the state's names, since one in the config may end another's.
    # Dropout was for training; PEFT's new layers would begin in train mode.
    lora = LoraConfig(**peft_config(part, ranks, replace(config, dropout=0.0)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several adapters are meant
        inject_adapter_in_model(lora, module, adapter_name=adapter, low_cpu_mem_usage=True, state_dict=state)
    set_peft_model_state_dict(module, state, adapter_name=adapter, low_cpu_mem_usage=True)
    empty = [key for key, value in module.named_parameters() if f".{adapter}." in key and value.is_meta]
    if empty:
        raise RuntimeError(f"adapter {adapter!r} on {part}: {empty[0]} stayed without its weights")


def _activate(module: nn.Module, adapter: str, scale: float) -> None:
    from peft.tuners.lora import LoraLayer

    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(list(layer.scaling), inference_mode=True)
            layer.set_scale(adapter, scale)


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Within it a module computes what it would without the low-rank adapters on it, which are not touched.

    Where an adapter was started from the base weight's own principal part (PiSSA, OLoRA), that part is missing.
    """
    layers = adapters_on(module)
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:  # `enable_adapters` would also change what is trained
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def adapters_on(module: nn.Module) -> list[BaseTunerLayer]:
    """The layers of a module that have low-rank adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def apply_pivotal(parts: Mapping[str, nn.Module], folder: Path, name: str, scale: float) -> None:
    """`apply` for a LoRA and the word that was learned with it, which has no scale."""
    fitting_lora(parts, folder)
    apply_word(parts, folder, name, 1.0)
    apply_lora(parts, folder, name, scale)


def moved_by_pivotal(parts: Mapping[str, nn.Module], folder: Path) -> set[str]:
    """`moved` for a LoRA with a word."""
    return moved_by_lora(parts, folder) | moved_by_word(parts, folder)


class Reader(NamedTuple):
    """How artefacts of one kind are read."""

    kind: Kind
    apply: Callable[[Mapping[str, nn.Module], Path, str, float], None]
    moved: Callable[[Mapping[str, nn.Module], Path], set[str]]


READERS = {
    PEFT_CONFIG: Reader("lora", apply_lora, moved_by_lora),
    DELTA: Reader("delta", apply_delta, moved_by_delta),
    EMBEDS: Reader("prompt", apply_word, moved_by_word),
}
"""Readers by the file that marks their kind."""
PIVOTAL = Reader("pivotal", apply_pivotal, moved_by_pivotal)
"""Of a folder that has both a LoRA's files and a word's."""
WORDY: tuple[Kind, ...] = ("prompt", "pivotal")
"""Kinds that have a word."""
