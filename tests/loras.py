"""LoRAs with known values for the tests of adapters, and fresh parts of a tiny model to put them on."""

from pathlib import Path

import torch
from torch import nn

from gtl.adapters import Card, Registry
from gtl.adapters.card import base_of
from gtl.adapters.formats import LoraExport, write_lora
from gtl.families import open_family
from tests.tiny import make_sd

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def load_unet(folder: Path) -> nn.Module:
    """A fresh frozen UNet, as a family loads it."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder / "unet").eval().requires_grad_(False)


def load_text_encoder(folder: Path) -> nn.Module:
    """A fresh frozen text encoder."""
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(folder / "text_encoder").eval().requires_grad_(False)


def load_pipeline(folder: Path):
    """The plain diffusers pipeline."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def random_lora(part: nn.Module, name: str, *, rank: int = 4, dora: bool = False, seed: int = 1, only: str = ""):
    """Canonical tensors with nonzero values for every linear and convolution layer whose name contains `only`."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, layer in part.named_modules():
        if only not in module or not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        out, *given = layer.weight.shape
        conv = isinstance(layer, nn.Conv2d)
        tensors[f"{name}.{module}.lora_A.weight"] = 0.1 * torch.randn(rank, *given, generator=rng)
        ones = [1, 1] if conv else []
        tensors[f"{name}.{module}.lora_B.weight"] = 0.1 * torch.randn(out, rank, *ones, generator=rng)
        if dora:
            shape = (1, out, 1, 1) if conv else (out,)
            tensors[f"{name}.{module}.lora_magnitude_vector.weight"] = 0.5 + torch.rand(shape, generator=rng)
    return tensors


@torch.no_grad()
def run_unet(unet: nn.Module) -> torch.Tensor:
    """The UNet's output on a fixed input, two samples at two times."""
    rng = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=rng).to(unet.dtype)
    states = torch.randn(2, 7, unet.config.cross_attention_dim, generator=rng).to(unet.dtype)
    added = {"time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 2)}
    if unet.config.addition_embed_type == "text_time":
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added["text_embeds"] = torch.randn(2, width, generator=rng).to(unet.dtype)
    return unet(noisy, torch.tensor([3, 700]), states, added_cond_kwargs=added).sample


@torch.no_grad()
def run_text_encoder(encoder: nn.Module) -> torch.Tensor:
    """Hidden states of a fixed prompt."""
    return encoder(torch.arange(3, 13)[None]).last_hidden_state


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal relative to the largest value."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def peft_reference(unet: nn.Module, tensors, *, rank: int, alpha: float, rslora: bool = False, dora: bool = False):
    """The UNet with PEFT's own layers, injected and filled by hand, trained as a tuner trains it."""
    from peft import LoraConfig, inject_adapter_in_model

    names = sorted({key.removeprefix("unet.").partition(".lora_")[0] for key in tensors})
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, use_dora=dora, target_modules=names)
    inject_adapter_in_model(config, unet)
    parameters = dict(unet.named_parameters())
    for key, tensor in tensors.items():
        parameters[key.removeprefix("unet.").removesuffix(".weight") + ".default.weight"].data.copy_(tensor)
    return unet.eval()


def merged_delta(tensors, module: str) -> torch.Tensor:
    """B A of a layer in its weight's shape."""
    a, b = tensors[f"unet.{module}.lora_A.weight"], tensors[f"unet.{module}.lora_B.weight"]
    return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])


def publish_dog(folder: Path) -> Path:
    """A tiny `model`, and a `registry` with a LoRA of it, dog@v1; returns the folder of both."""
    model = make_sd(folder / "model")
    write_lora(random_lora(load_unet(model), "unet"), folder / "lora", config=LoraExport(rank=4, alpha=4))
    card = Card(name="dog", version="v1", base=base_of(open_family(str(model)), str(model)), tuner={"type": "lora"})
    Registry(folder / "registry").publish("dog", "v1", folder / "lora", card)
    return folder
