"""What latent models with a transformer share (Peebles & Xie 2022, arXiv 2212.09748)."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from gtl.families.base import Conditions
from gtl.families.latent import LatentDiffusion, unstack
from gtl.families.targets import CROSS, JOINT, Endings, find_targets
from gtl.types import Sampler, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKED = 2
"""Latents a side of a token, in models whose tokens are packed outside of the transformer."""


class LatentTransformer(LatentDiffusion, ABC):
    """A transformer over patches of the latents of a VAE, whose blocks attend to image and text jointly."""

    main: ClassVar[str] = "transformer"
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """Lists of blocks, in the order they run."""
    head: ClassVar[tuple[str, ...]] = ("norm_out", "proj_out")
    """Behind the blocks."""
    endings: ClassVar[Endings] = JOINT
    """Of the layers in the target sets that are known by them."""
    reader: ClassVar[str] = "attn"
    """Name, in a block, of the attention that reads the text."""

    def blocks(self, main: nn.Module) -> list[tuple[str, ...]]:
        """Every transformer block in execution order."""
        return [(f"{stack}.{i}",) for stack in self.stacks for i in range(len(getattr(main, stack)))]

    def counterparts(self, main: nn.Module, larger: nn.Module) -> list[tuple[str, str]]:
        """The blocks of each stack, and those that are as far through the larger one's."""
        found = []
        for stack in self.stacks:
            mine, theirs = len(getattr(main, stack)), len(getattr(larger, stack))
            found += [(f"{stack}.{i}", f"{stack}.{(i + 1) * theirs // mine - 1}") for i in range(mine)]
        return found

    def middle(self, main: nn.Module) -> tuple[str, int]:
        """The block half-way through those that read the text; as wide as all of them."""
        found = self.sections(main)
        return found[len(found) // 2]

    def sections(self, main: nn.Module) -> list[tuple[str, int]]:
        """The blocks that read the text; all of one width."""
        return [(reader.rpartition(".")[0], self.width) for reader in self.cross_attentions(main)]

    @property
    def width(self) -> int:
        """Channels of a token between the blocks."""
        config = self.config(self.main)
        return int(config["num_attention_heads"]) * int(config["attention_head_dim"])

    def embedders(self, main: nn.Module) -> tuple[str, ...]:
        """The projections of patches and of text, and the embedding of time and pooled text."""
        return tuple(
            name
            for name, child in main.named_children()
            if name not in (*self.stacks, *self.head) and next(child.parameters(), None) is not None
        )

    def lora_targets(self, main: nn.Module, targets: str | Sequence[str]) -> list[str]:
        """Full names of the layers that a target set names, in order."""
        return find_targets(main, self.embedders(main), self.blocks(main), targets, self.endings)

    def cross_attentions(self, main: nn.Module) -> tuple[str, ...]:
        """Of every block, the attention that reads the text."""
        return tuple(f"{block}.{self.reader}" for (block,) in self.blocks(main))

    @property
    def patch_size(self) -> int:
        """Latents a side of a patch."""
        return int(self.config(self.main)["patch_size"])

    @property
    def multiple(self) -> int:
        """The VAE's scale times the size of a patch."""
        return self.latent_scale * self.patch_size

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels the transformer was made for, or else the VAE: not every transformer's config says.

        That of a transformer counts in latents.
        """
        latents = self.config(self.main).get("sample_size")
        size = int(self.config("vae")["sample_size"]) if latents is None else int(latents) * self.latent_scale
        return size, size

    def guidance_conditions(self, scale: float) -> Conditions:
        """`guidance` [] for a model that embeds it, such as FLUX.1 dev; {} for most others."""
        import torch

        embeds = self.config(self.main).get("guidance_embeds", False)
        return {"guidance": torch.tensor(scale, dtype=torch.float32)} if embeds else {}

    def sampler(self, steps: int, height: int, width: int, kind: Sampler = "model") -> Any:
        """A fresh diffusers scheduler with its timesteps set, shifted for images of this size if its config asks.

        Raises:
            UserError: the scheduler cannot be told what the model needs.
        """
        from gtl.diffusion.path import make_scheduler, sampler_config

        scheduler = make_scheduler(sampler_config(self.scheduler_config, kind))
        options = self.sampler_options(steps)
        is_dynamic = scheduler.config.get("use_dynamic_shifting", False)
        needed = {*options, *(["mu"] if is_dynamic else [])}
        if unknown := needed - inspect.signature(scheduler.set_timesteps).parameters.keys():
            name = type(scheduler).__name__
            raise UserError(f"scheduler_config.json: _class_name: {name!r}: takes no {', '.join(sorted(unknown))}")
        if is_dynamic:
            num_patches = height // self.multiple * (width // self.multiple)
            options["mu"] = self.dynamic_shift(scheduler.config, num_patches, steps)
        scheduler.set_timesteps(steps, **options)
        return scheduler

    def dynamic_shift(self, config: Any, num_patches: int, steps: int) -> float:
        """The scheduler's `mu`: a line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).

        Larger images keep more of their signal at the same noise, so they are noised further (arXiv 2403.03206, section
        5.3.2); that mu is linear in the number of patches comes from FLUX.1's own sampling code.
        """
        rise = config["max_shift"] - config["base_shift"]
        run = config["max_image_seq_len"] - config["base_image_seq_len"]
        shift: float = config["base_shift"] + rise / run * (num_patches - config["base_image_seq_len"])
        return shift

    def sampler_options(self, steps: int) -> dict[str, Any]:
        """What else the family's pipeline in diffusers tells the scheduler."""
        return {}


class CrossTransformer(LatentTransformer, ABC):
    """A transformer whose blocks attend to the image, and then to the text of one encoder without its padding."""

    endings: ClassVar[Endings] = CROSS
    reader: ClassVar[str] = "attn2"

    def tokenize(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """`input_ids` and `attention_mask` [tokens] of each prompt, in lower case; cut and padded."""
        batch = self._read("text_encoder", [prompt.lower().strip() for prompt in prompts])
        return unstack({name: batch[name] for name in ("input_ids", "attention_mask")})

    def encode_tokens(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> Conditions:
        """The encoder's last hidden states, [B, tokens, D], and `encoder_attention_mask` [B, tokens]: 0 is padding."""
        encoder = cast(Any, encoders["text_encoder"])
        given = {name: value.to(encoder.device) for name, value in tokens.items()}
        return {"encoder_hidden_states": encoder(**given)[0], "encoder_attention_mask": given["attention_mask"]}


def equal_steps(steps: int) -> list[float]:
    """Shares of the way to noise before the shift, from 1 in equal steps down to 1 / steps."""
    return [1 - i / steps for i in range(steps)]


def pack(latents: Tensor) -> Tensor:
    """[B, C, 2 rows, 2 columns] to tokens [B, rows columns, 4 C], row by row; of a token's channels C is outermost."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PACKED, PACKED, width // PACKED, PACKED)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`."""
    patches = tokens.unflatten(2, (-1, PACKED, PACKED)).unflatten(1, (rows, columns))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
