"""A cascade that has learned nothing: the parts and files of DeepFloyd IF at a size that two CPU cores can train."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

SMALL, LARGE = 16, 32
"""Sides of the pictures of the two stages, in pixels."""
WIDTH = 64
"""Of what is read of a prompt, a token."""
UNET: dict[str, Any] = {
    "out_channels": 6, "layers_per_block": 1, "cross_attention_dim": WIDTH, "encoder_hid_dim": WIDTH,
    "attention_head_dim": 16, "norm_num_groups": 8, "cross_attention_norm": "group_norm", "act_fn": "gelu",
    "addition_embed_type": "text", "addition_embed_type_num_heads": 4, "resnet_time_scale_shift": "scale_shift",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}  # fmt: skip
FIRST: dict[str, Any] = {
    **UNET, "sample_size": SMALL, "in_channels": 3, "block_out_channels": (48, 96),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}  # fmt: skip
SECOND: dict[str, Any] = {
    **UNET, "sample_size": LARGE, "in_channels": 6, "block_out_channels": (24, 48, 64), "class_embed_type": "timestep",
    "only_cross_attention": True,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2 + ("SimpleCrossAttnDownBlock2D",),
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) + ("ResnetUpsampleBlock2D",) * 2,
}  # fmt: skip
TEXT_ENCODER: dict[str, Any] = {
    "d_model": WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}  # fmt: skip
NOISING: dict[str, Any] = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
}  # fmt: skip
SCHEDULER: dict[str, Any] = {
    **NOISING, "prediction_type": "epsilon", "variance_type": "learned_range", "thresholding": True,
    "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.0,
}  # fmt: skip
NULLS = ("safety_checker", "feature_extractor", "watermarker")


def write_cascade(folder: Path, words: Iterable[str], seed: int = 0) -> None:
    """Write both stages with random weights, into `first` and `second`; they share a text encoder.

    Args:
        folder: Where to.
        words: Each gets a token of its own; anything else is spelled in ASCII letters.
        seed: Of the weights.
    """
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    listed = sorted(words)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder: nn.Module | None = None
        for stage, unet in (("second", SECOND), ("first", FIRST)):
            number = write_tokenizer(folder / stage / "tokenizer", listed)
            encoder = encoder or make_encoder(number)
            _write_stage(folder / stage, {"unet": UNet2DConditionModel(**unet), "text_encoder": encoder})


def make_encoder(number: int) -> nn.Module:
    """A T5 encoder of so many tokens, with random weights.

    Of the scale that T5 begins with its embeddings have unit variance, so that every word is seen from the first step.
    """
    from transformers import T5Config, T5EncoderModel

    encoder: nn.Module = T5EncoderModel(T5Config(vocab_size=number, **TEXT_ENCODER))
    return encoder


def write_tokenizer(folder: Path, words: Iterable[str]) -> int:
    """Write a Unigram tokenizer in T5's files; how many tokens it has."""
    import transformers

    make: Any = getattr(transformers, "T5TokenizerFast")  # noqa: B009 - its stubs do not have the name
    known = {f"\u2581{word}": -2.0 for word in words} | {chr(code): -8.0 for code in range(33, 127)}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0), *known.items()]
    tokenizer = make(vocab=pieces, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _write_stage(folder: Path, parts: dict[str, nn.Module]) -> None:
    """One stage; `model_index.json` is written last."""
    for part, module in parts.items():
        module.save_pretrained(folder / part)  # type: ignore[operator]
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    more: dict[str, Any] = {}
    if folder.name == "second":
        _write_json(folder / "image_noising_scheduler" / "scheduler_config.json", NOISING)
        more = {"image_noising_scheduler": ["diffusers", "DDPMScheduler"], "scale": LARGE // SMALL}
    _write_json(folder / "model_index.json", {
        "_class_name": "IFSuperResolutionPipeline" if more else "IFPipeline",
        "requires_safety_checker": False, "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"],
        "unet": ["diffusers", "UNet2DConditionModel"], **{name: [None, None] for name in NULLS}, **more,
    })  # fmt: skip


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
