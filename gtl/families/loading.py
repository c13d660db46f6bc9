"""Weights from safetensors files into modules that were built without any."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gtl.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names inside attention modules in autoencoders that were published before diffusers 0.17."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without storage, and real buffers; what they draw is not seen outside.

    `torch.device("meta")` would also take the buffers that are in no file, such as position ids.
    """
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # declared without a result
    try:
        with torch.random.fork_rng(devices=[]):  # some parameters are drawn before they are registered
            yield
    finally:
        handle.remove()


def ties_of(module: nn.Module) -> dict[str, str]:
    """Parameters that a transformers model has under a second name -> the first; a file holds them under either."""
    return dict(getattr(module, "all_tied_weights_keys", {}))


def read_tensors(
    files: Iterable[Path], names: Collection[str], ties: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors under a module's state-dict names, one by one; each is mapped from the file, not copied.

    What the module does not have is left out, with a warning. What is stored under one of two tied names comes under
    both.

    Raises:
        UserError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    known = frozenset(names)
    ties = ties or {}
    twins = {**ties, **{first: second for second, first in ties.items()}}
    tied: dict[str, Tensor] = {}
    left_out = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118 - not a mapping
                    name = next((name for name in _spellings(key) if name in known), None)
                    if name is None:
                        left_out.append(key)
                        continue
                    tensor = stored.get_tensor(key)
                    if name in twins:
                        tied[name] = tensor
                    yield name, tensor
        except (SafetensorError, OSError) as error:
            raise damaged(file, error) from error
    yield from ((twin, tied[name]) for twin, name in twins.items() if name in tied and twin not in tied)
    left_out = [key for key in left_out if not key.endswith("position_ids")]
    if left_out:
        log.warning("%s: %d tensors that the model does not have, such as %s", file, len(left_out), left_out[0])


def check_whole(file: Path) -> None:
    """See that a safetensors file is as long as it says itself; no tensor is read.

    Raises:
        UserError: it is not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):  # which needs no torch
            pass
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> UserError:
    """What is to be done about a file of weights that cannot be read."""
    return UserError(f"{file}: damaged ({error}); get the file again")


def _spellings(key: str) -> Iterator[str]:
    """A stored name, then what later or earlier versions of the libraries call the same tensor."""
    yield key
    prefix = "text_model."
    yield key.removeprefix(prefix) if key.startswith(prefix) else prefix + key
    # Language models, stored with or without their heads, and inside of models that see.
    bare = re.sub(r"^(language_model\.)?(model\.)?", "", key)
    yield from (bare, f"model.{key}", f"model.language_model.{bare}")
    yield re.sub(r"\.(query|key|value|proj_attn)\.(?=\w+$)", lambda match: f".{OLD_ATTENTION[match[1]]}.", key)


def fill(module: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, where: Path) -> None:
    """Give a module from `parameters_on_meta` its weights.

    Raises:
        UserError: they do not fit the module; `where` is named.
    """
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    state = {}
    for name, tensor in tensors:
        # Linear layers of old autoencoders were stored as 1x1 convolutions.
        if tensor.shape != expected[name] and tensor.squeeze().shape != expected[name]:
            found, wanted = list(tensor.shape), list(expected[name])
            raise UserError(f"{where}: {name} has shape {found}; config.json describes {wanted}")
        tensor = tensor.reshape(expected[name])
        state[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    if missing := sorted(expected.keys() - state):
        raise UserError(f"{where}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}")
    module.load_state_dict(state, assign=True)
    for second, first in ties_of(module).items():
        owner, _, name = second.rpartition(".")
        setattr(module.get_submodule(owner), name, module.get_parameter(first))


def write_weights(module: nn.Module, folder: Path) -> None:
    """Write a module's state dict, under its own names, as `model.safetensors`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
