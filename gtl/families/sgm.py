"""LoRA keys by the block names of Stability's own code, in which kohya's sd-scripts writes them for SDXL."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from gtl.types import UserError

PREFIX = "lora_unet_"
BLOCKS = ("input_blocks", "middle_block", "output_blocks")


def diffusers_keys(keys: Iterable[str], layers_per_block: int, where: Path) -> dict[str, str]:
    """Each key -> the same with diffusers' names: of input_blocks_4_1_..., down_blocks_1_attentions_0_..., for example.

    Other keys stay as they are. Where a file has its blocks under both names, these are left out, as in diffusers.

    Args:
        keys: All of a file.
        layers_per_block: Of the UNet's config; the blocks are counted by it.
        where: The file, for messages.

    Raises:
        UserError: a key has no place in such a UNet.
    """
    given = {key: key for key in keys}
    if not any(key.startswith(f"{PREFIX}{block}") for key in given for block in BLOCKS):
        return given
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    try:
        # It moves values from key to key: here each key's own spelling.
        renamed = _maybe_map_sgm_blocks_to_diffusers(dict(given), SimpleNamespace(layers_per_block=layers_per_block))
    except (ValueError, LookupError) as error:
        message = f"its keys of {', '.join(BLOCKS)} are not those of a UNet with {layers_per_block} layers a block"
        raise UserError(f"{where}: {message}") from error
    return {old: _with_layer(new) if new.startswith(PREFIX) else new for new, old in renamed.items()}


def _with_layer(key: str) -> str:
    """A key whose block is named already, with the layer in it named too: in_layers_2 is conv1, for example."""
    from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key

    stem, _, ending = key.partition(".")
    name = _convert_unet_lora_key(stem).replace(".processor.", ".").replace(".", "_")
    return f"{PREFIX}{name}.{ending}"
