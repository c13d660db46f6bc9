"""A model that has learned nothing: Stable Diffusion's parts and files at a size that two CPU cores can train."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

SIZE = 64
"""Side of its pictures in pixels; latents are [8, 16, 16]."""
TOKENS = 32
"""Length of a prompt, with the tokens at its ends."""
START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
"""Of a token that ends a word."""

# Eight channels a latent instead of Stable Diffusion's four: so small a codec then keeps edges, colours and the fine
# lines of a style within minutes of training.
VAE: dict[str, Any] = {
    "sample_size": SIZE, "block_out_channels": (16, 32, 64), "layers_per_block": 1, "latent_channels": 8,
    "norm_num_groups": 8, "mid_block_add_attention": False,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
}  # fmt: skip
UNET: dict[str, Any] = {
    "sample_size": SIZE // 4, "in_channels": 8, "out_channels": 8, "block_out_channels": (32, 64, 96),
    "layers_per_block": 1, "cross_attention_dim": 96,
    "attention_head_dim": (2, 4, 4), "norm_num_groups": 8, "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    # The pooled text joins the time, and both scale what every ResNet does: so small a model takes far longer to learn
    # shapes by attention alone.
    "addition_embed_type": "text", "addition_embed_type_num_heads": 4, "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 96, "projection_dim": 96, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": TOKENS,
}  # fmt: skip
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "clip_sample": False,
    # The last step is pure noise, from which alone a plain black or white background can be drawn (arXiv 2305.08891).
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps_offset": 1,
    "set_alpha_to_one": False,
}  # fmt: skip
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None], "image_encoder": [None, None],
    "requires_safety_checker": False, "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip


def write_blank(folder: Path, words: Iterable[str], seed: int = 0) -> None:
    """Write a model with random weights (fp32, about 3.2 million) in the layout of Stable Diffusion.

    Args:
        folder: Where to; `model_index.json` is written last.
        words: Each gets a token of its own; anything else is spelled in bytes.
        seed: Of the weights.
    """
    vocabulary = write_tokenizer(folder / "tokenizer", words)
    for part, module in make_parts(vocabulary, seed).items():
        module.save_pretrained(folder / part)  # type: ignore[operator]
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "model_index.json", INDEX)


def forget(source: str, folder: Path) -> None:
    """Write a model with random weights in what draws and what reads; its codec stays.

    Raises:
        UserError: there is no such model.
    """
    import torch

    from gtl.families import open_family

    family = open_family(source)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        family.export({part: family.build(part) for part in (family.main, *family.encoders)}, folder)


def make_parts(vocabulary: dict[str, int], seed: int) -> dict[str, nn.Module]:
    """VAE, UNet and text encoder with weights that depend on the seed alone."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    end = vocabulary[END]
    ends: dict[str, Any] = {"bos_token_id": vocabulary[START], "eos_token_id": end, "pad_token_id": end}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return {
            "vae": AutoencoderKL(**VAE),
            "unet": UNet2DConditionModel(**UNET),
            "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=len(vocabulary), **TEXT_ENCODER, **ends)),
        }


def write_tokenizer(folder: Path, words: Iterable[str]) -> dict[str, int]:
    """Write a byte-level BPE tokenizer in CLIP's files and return its vocabulary: bytes, and what words are made of."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = learn_merges(words)
    tokens = [*letters, *(letter + SUFFIX for letter in letters), *(a + b for a, b in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ends = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **ends}
    )
    return vocabulary


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding (Sennrich et al. 2015, arXiv 1508.07909) until every word is one token.

    Words are of ASCII letters. The `tokenizers` library breaks ties by chance; here the last in the alphabet wins.
    """
    spelled = [[*word[:-1], word[-1] + SUFFIX] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for tokens in spelled for pair in pairwise(tokens)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(tokens, best) for tokens in spelled]
    return merges


def _merge(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in tokens:
        # A merged token is longer than either of the pair, so it takes no part in the next merge.
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
