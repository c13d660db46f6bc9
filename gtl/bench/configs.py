"""Models by name: the configs of published ones, and one for a laptop. Weights are random, see `gtl.bench.models`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
BUILTIN = "builtin:"
"""How the names of models begin that this project brings along, with weights."""


@dataclass(frozen=True)
class Model:
    """All that a folder in diffusers layout says of a model beside its weights."""

    pipeline: str
    """Class name of its pipeline in diffusers."""
    parts: Mapping[str, Config]
    """config.json of every part; diffusers' and transformers' defaults are those of the published models."""
    classes: Mapping[str, tuple[str, str]]
    """Of every part and tokenizer: the library and class that the index names."""
    scheduler: Config = field(default_factory=dict)
    """Of its sampler, with the class under `_class_name`."""


def clip(width: int, layers: int, heads: int, act: str = "quick_gelu", **more: Any) -> Config:
    """A CLIP text encoder's config."""
    return {
        "vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": act, **more,
    }  # fmt: skip


def vae(channels: int = 4, **more: Any) -> Config:
    """A VAE's config: that of Stable Diffusion 1.5, unless said otherwise."""
    return {
        "latent_channels": channels, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, **more,
    }  # fmt: skip


SD_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
}  # fmt: skip
SDXL_CLASSES = {
    **SD_CLASSES, "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
}  # fmt: skip
FLUX_CLASSES = {
    "transformer": ("diffusers", "FluxTransformer2DModel"), "vae": SD_CLASSES["vae"],
    "text_encoder": SD_CLASSES["text_encoder"], "tokenizer": SD_CLASSES["tokenizer"],
    "text_encoder_2": ("transformers", "T5EncoderModel"), "tokenizer_2": ("transformers", "T5TokenizerFast"),
}  # fmt: skip
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDPM = {"_class_name": "DDPMScheduler", **BETAS}
WIDTHS = [320, 640, 1280, 1280]

MODELS: dict[str, Model] = {
    "small": Model(
        "StableDiffusionPipeline",
        {
            "unet": {
                "block_out_channels": [64, 128], "layers_per_block": 1, "cross_attention_dim": 128,
                "attention_head_dim": 8, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "sample_size": 16,
            },
            "vae": vae(), "text_encoder": clip(128, 2, 4),
        },
        SD_CLASSES, DDPM,
    ),
    "sd15": Model(
        "StableDiffusionPipeline",
        {
            "unet": {"block_out_channels": WIDTHS, "cross_attention_dim": 768, "attention_head_dim": 8,
                     "sample_size": 64},
            "vae": vae(), "text_encoder": clip(768, 12, 12),
        },
        SD_CLASSES, DDPM,
    ),
    "sd2": Model(  # 2.1-base, that for 512 pixels
        "StableDiffusionPipeline",
        {
            "unet": {"block_out_channels": WIDTHS, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
                     "use_linear_projection": True, "sample_size": 64},
            "vae": vae(), "text_encoder": clip(1024, 23, 16, "gelu"),
        },
        SD_CLASSES, DDPM,
    ),
    "sdxl": Model(
        "StableDiffusionXLPipeline",
        {
            "unet": {
                "block_out_channels": WIDTHS[:3], "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "sample_size": 128,
                "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            "vae": vae(scaling_factor=0.13025), "text_encoder": clip(768, 12, 12),
            "text_encoder_2": clip(1280, 32, 20, "gelu", projection_dim=1280),
        },
        SDXL_CLASSES, {"_class_name": "EulerDiscreteScheduler", **BETAS},
    ),
    "flux": Model(  # FLUX.1 dev
        "FluxPipeline",
        {
            "transformer": {
                "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128,
                "in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
                "axes_dims_rope": [16, 56, 56],
            },
            "vae": vae(16, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                       use_post_quant_conv=False),
            "text_encoder": clip(768, 12, 12),
            "text_encoder_2": {
                "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
                "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
            },
        },
        FLUX_CLASSES,
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True,
            "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15,
        },
    ),
}  # fmt: skip
