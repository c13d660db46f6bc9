"""Models and data for benchmarks, made from their configs with random values; nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gtl.storage import Store

if TYPE_CHECKING:
    from gtl.data.dataset import Dataset
    from gtl.families.base import DiffusionFamily

CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDPMScheduler"],
}  # fmt: skip
SCHEDULER = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
UNETS: dict[str, dict[str, Any]] = {
    "small": {"block_out_channels": [64, 128], "layers_per_block": 1, "cross_attention_dim": 128,
              "attention_head_dim": 8, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
              "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "sample_size": 16},
    "sd15": {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 768,
             "attention_head_dim": 8, "sample_size": 64},
}  # fmt: skip
"""UNets by name: one for a laptop, and that of Stable Diffusion 1.5."""


def write_model(folder: Path, name: str) -> DiffusionFamily:
    """A model in diffusers layout whose UNet has random weights; its other parts are configs only."""
    import torch
    from safetensors.torch import save_file

    from gtl.families import open_family

    configs = {"unet": {"_class_name": "UNet2DConditionModel", **UNETS[name]}, "vae": VAE, "text_encoder": {}}
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **CLASSES}))
    family = open_family(str(folder))
    torch.manual_seed(0)
    save_file(family.build("unet").state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors")
    return family


def write_dataset(cache: Store, family: DiffusionFamily, images: int) -> Dataset:
    """As many random images of the family's own size, encoded, with one caption."""
    import torch

    from gtl.data.buckets import variant_key, variants
    from gtl.data.cache import Space, prompt_key
    from gtl.data.dataset import Cuts, Dataset
    from gtl.types import Entry, Record

    rng = torch.Generator().manual_seed(0)
    size = family.default_size
    shape = family.latent_shape(*size)
    width = cast(Any, family).config(family.main)["cross_attention_dim"]
    entries, latents = [], {}
    for i in range(images):
        sha256 = hashlib.sha256(str(i).encode()).hexdigest()
        key = variant_key(sha256, size, variants(sha256, size, size)[0])
        latents[key] = {"mean": torch.randn(shape, generator=rng), "logvar": torch.full(shape, -10.0)}
        entries.append(Entry(Record(f"{i}", sha256, size, ("a picture",)), size, (key,)))
    prompts = {
        prompt_key(caption): {"encoder_hidden_states": torch.randn(77, width, generator=rng)}
        for caption in ("", "a picture")
    }
    dataset = Dataset(cache, entries, "images-bench", "prompts-bench", Cuts(crops=1, flip=False, seed=0))
    Space(cache, "images-bench").write(latents)
    Space(cache, "prompts-bench").write(prompts)
    dataset.refresh()
    return dataset
