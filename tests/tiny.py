"""Tiny models with the real classes and the real file layout, made on the spot."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = """a photo of the red blue green yellow square circle dog cat bird horse fish tree house car boat flower on in
with and at small large old young sitting standing running white black brown grass water sky street night day portrait
drawing painting of an animal image picture style sks low quality blurry""".split()

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
CHAT = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{%- endif %}"""
"""Qwen's, without tools."""
MISTRAL_CHAT = """{{- bos_token }}{%- for message in messages %}
{%- set mark = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}[{{ mark }}]
{%- for part in message.content %}{{ part.text }}{% endfor %}[/{{ mark }}]{% endfor %}"""
"""Mistral's, without pictures and tools."""
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def make_sd(
    folder: str | Path,
    *,
    prediction_type: str = "epsilon",
    seed: int = 0,
    scheduler: str = "PNDMScheduler",
    scheduler_config: Mapping[str, Any] | None = None,
    unet_config: Mapping[str, Any] | None = None,
    vae_levels: int = 4,
    text_width: int = 32,
    shards: bool = False,
    variant: str | None = None,
    legacy: bool = False,
) -> Path:
    """Write a Stable-Diffusion-layout pipeline of about 2 MB; plain `StableDiffusionPipeline.from_pretrained` loads it.

    It works on 64x64 pixels (vae_levels 4) in latents of 4x8x8, with 8 ResNets and 4 transformer blocks.
    `v_prediction` gives the layout of 2.x (linear projections, GELU in the text encoder). `shards` splits the UNet's
    file in several with an index, `variant` ("fp16": also stored in half precision) goes into the files' names.
    `legacy` names tensors as the published files of 1.5 do.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextModel

    folder = Path(folder)
    is_v2 = prediction_type == "v_prediction"
    vocabulary = write_clip_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": text_width,
            "attention_head_dim": (2, 4),
            "norm_num_groups": 8,
            "use_linear_projection": is_v2,
            **(unet_config or {}),
        })
        vae = make_vae(vae_levels)
        text_encoder = CLIPTextModel(clip_config(vocabulary, text_width, "gelu" if is_v2 else "quick_gelu"))
    dtype = torch.float16 if variant == "fp16" else torch.float32
    suffix = f".{variant}" if variant else ""
    for name, part in {"unet": unet, "vae": vae}.items():
        size = {"max_shard_size": "300KB"} if shards and name == "unet" else {}
        torch.nn.Module.to(part, dtype)  # not diffusers' own, which warns
        part.save_pretrained(folder / name, variant=variant, **size)
        if legacy and name == "vae":
            file = folder / name / f"diffusion_pytorch_model{suffix}.safetensors"
            save_file({_legacy_vae(key): tensor for key, tensor in part.state_dict().items()}, file, {"format": "pt"})
    tensors = {key: tensor.to(dtype) for key, tensor in text_encoder.state_dict().items()}
    if legacy:
        tensors = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    text_encoder.config.architectures = ["CLIPTextModel"]
    text_encoder.config.save_pretrained(folder / "text_encoder")
    save_file(tensors, folder / "text_encoder" / f"model{suffix}.safetensors", {"format": "pt"})
    write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": scheduler,
        **SD_BETAS,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
        **({"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}),
        **(scheduler_config or {}),
    })
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.38.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })
    return folder


def make_sdxl(
    folder: str | Path, *, seed: int = 0, unet_config: Mapping[str, Any] | None = None, **index: Any
) -> Path:
    """Write a Stable-Diffusion-XL-layout pipeline; plain `StableDiffusionXLPipeline.from_pretrained` loads it.

    Like `make_sd` it works on 64x64 pixels in latents of 4x8x8, with 8 ResNets; 4 attentions have 8 transformer blocks.
    The text encoders differ in width, activation and padding. `index` is put into model_index.json.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = Path(folder)
    vocabulary = write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "unet": UNet2DConditionModel(**{
                "sample_size": 8,
                "block_out_channels": (16, 32),
                "layers_per_block": 1,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2),
                "cross_attention_dim": 32 + 48,
                "attention_head_dim": (2, 4),
                "norm_num_groups": 8,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 24,
                **(unet_config or {}),
            }),
            "vae": make_vae(scaling_factor=0.13025, force_upcast=True),
            "text_encoder": CLIPTextModel(clip_config(vocabulary, 32, "quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(clip_config(vocabulary, 48, "gelu", projection_dim=24)),
        }
    return write_pipeline(folder, "StableDiffusionXLPipeline", parts, {
        "_class_name": "EulerDiscreteScheduler",
        **SD_BETAS,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "interpolation_type": "linear",
        "steps_offset": 1,
        "use_karras_sigmas": False,
    }, {
        "force_zeros_for_empty_prompt": True,
        "add_watermarker": False,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        **index,
    })


def make_sd3(
    folder: str | Path, *, seed: int = 0, t5: bool = True, transformer_config: Mapping[str, Any] | None = None
) -> Path:
    """Write a Stable-Diffusion-3-layout pipeline; plain `StableDiffusion3Pipeline.from_pretrained` loads it.

    It works on 64x64 pixels in latents of 16x8x8, and on at most 128x128, with 3 transformer blocks. Without `t5` the
    third text encoder and its tokenizer are left out, as people do to save memory.
    """
    import torch
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    folder = Path(folder)
    vocabulary = write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "transformer": SD3Transformer2DModel(**{
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 3,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "joint_attention_dim": 96,
                "caption_projection_dim": 64,
                "pooled_projection_dim": 32 + 24,
                "pos_embed_max_size": 8,
                **(transformer_config or {}),
            }),
            "vae": make_vae(
                latent_channels=16, scaling_factor=0.9, shift_factor=0.0609, use_quant_conv=False,
                use_post_quant_conv=False, force_upcast=True,
            ),
            "text_encoder": CLIPTextModelWithProjection(clip_config(vocabulary, 32, "quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(clip_config(vocabulary, 48, "gelu", projection_dim=24)),
        }  # fmt: skip
        if t5:
            parts["text_encoder_3"] = make_t5(write_t5_tokenizer(folder / "tokenizer_3"), 96)
    widen_head(parts["transformer"].proj_out)
    return write_pipeline(folder, "StableDiffusion3Pipeline", parts, {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
    }, {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        **({} if t5 else {"text_encoder_3": [None, None]}),
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"] if t5 else [None, None],
    })


def make_flux(
    folder: str | Path, *, seed: int = 0, dev: bool = True, scheduler_config: Mapping[str, Any] | None = None
) -> Path:
    """Write a FLUX.1-layout pipeline, of dev or else of schnell; plain `FluxPipeline.from_pretrained` loads it.

    It works on 64x64 pixels in latents of 16x8x8, which are packed to 16 tokens, with 2 double and 2 single blocks.
    dev embeds the scale of guidance and shifts by the size of the image, schnell does neither.
    """
    import torch
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextModel

    folder = Path(folder)
    vocabulary = write_clip_tokenizer(folder / "tokenizer")
    num_tokens = write_t5_tokenizer(folder / "tokenizer_2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "transformer": FluxTransformer2DModel(
                patch_size=1,
                in_channels=64,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=48,
                pooled_projection_dim=32,
                guidance_embeds=dev,
                axes_dims_rope=(4, 6, 6),
            ),
            "vae": make_vae(
                latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                use_post_quant_conv=False, force_upcast=True,
            ),
            "text_encoder": CLIPTextModel(clip_config(vocabulary, 32, "quick_gelu")),
            "text_encoder_2": make_t5(num_tokens, 48),
        }  # fmt: skip
    widen_head(parts["transformer"].proj_out)
    return write_pipeline(folder, "FluxPipeline", parts, {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "shift": 3.0 if dev else 1.0,
        "use_dynamic_shifting": dev,
        **(scheduler_config or {}),
    }, {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
    })


def make_flux2(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a FLUX.2-dev-layout pipeline; plain `Flux2Pipeline.from_pretrained` loads it.

    64x64 pixels are latents of 4x8x8 in patches of 16x4x4, for 2 double and 2 single blocks. Where the published model
    names a processor, which needs torchvision, this names the tokenizer inside of it.
    """
    from transformers import Mistral3ForConditionalGeneration

    num_tokens = write_mistral_tokenizer(Path(folder) / "tokenizer")
    return _write_flux2(
        Path(folder), "Flux2Pipeline", "PreTrainedTokenizerFast", seed, guidance_embeds=True,
        text_encoder=lambda: Mistral3ForConditionalGeneration(mistral3_config(num_tokens, 16)),
    )  # fmt: skip


def make_flux2_klein(folder: str | Path, *, seed: int = 0, distilled: bool = False) -> Path:
    """Write a FLUX.2-klein-layout pipeline; plain `Flux2KleinPipeline.from_pretrained` loads it.

    Its sizes are those of `make_flux2`.
    """
    from transformers import Qwen3ForCausalLM

    num_tokens = write_qwen_tokenizer(Path(folder) / "tokenizer")
    return _write_flux2(
        Path(folder), "Flux2KleinPipeline", "Qwen2Tokenizer", seed, guidance_embeds=False, is_distilled=distilled,
        text_encoder=lambda: Qwen3ForCausalLM(qwen3_config(num_tokens, 16, layers=28, heads=2)),
    )  # fmt: skip


def _write_flux2(
    folder: Path, pipeline: str, tokenizer: str, seed: int, *, guidance_embeds: bool, text_encoder: Callable[[], Any],
    **index: Any,
) -> Path:  # fmt: skip
    import torch
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "transformer": Flux2Transformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=3 * 16,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 4, 4, 4),
            ),
            "vae": make_vae(kind=AutoencoderKLFlux2),
            "text_encoder": text_encoder(),
        }
        parts["vae"].bn.running_mean.normal_()
        parts["vae"].bn.running_var.uniform_(0.5, 2.0)
    widen_head(parts["transformer"].proj_out)
    return write_pipeline(folder, pipeline, parts, {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    }, {
        **index,
        "tokenizer": ["transformers", tokenizer],
    })


def make_qwen_image(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a Qwen-Image-layout pipeline; plain `QwenImagePipeline.from_pretrained` loads it.

    64x64 pixels are latents of 16x8x8, which are packed to 16 tokens, for 2 double blocks.
    """
    import torch
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = Path(folder)
    num_tokens = write_qwen_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "transformer": QwenImageTransformer2DModel(
                patch_size=2,
                in_channels=64,
                out_channels=16,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=48,
                axes_dims_rope=(4, 6, 6),
            ),
            "vae": AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(qwen2_vl_config(num_tokens, 48)),
        }
    widen_head(parts["transformer"].proj_out)
    widen_head(parts["vae"].decoder.conv_out)
    return write_pipeline(folder, "QwenImagePipeline", parts, {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "shift": 1.0,
        "shift_terminal": 0.02,
        "use_dynamic_shifting": True,
    }, {
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
    })


def make_z_image(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a Z-Image-layout pipeline; plain `ZImagePipeline.from_pretrained` loads it.

    It works on 64x64 pixels in latents of 16x8x8, and on at most 256x256, with a refiner of each kind and 2 blocks
    behind them.
    """
    import torch
    from diffusers import ZImageTransformer2DModel
    from transformers import Qwen3Model

    folder = Path(folder)
    num_tokens = write_qwen_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "transformer": ZImageTransformer2DModel(
                in_channels=16,
                dim=64,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=4,
                n_kv_heads=4,
                cap_feat_dim=48,
                axes_dims=[4, 6, 6],
                axes_lens=[1024, 16, 16],
            ),
            "vae": make_vae(
                latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                use_post_quant_conv=False, force_upcast=True,
            ),
            "text_encoder": Qwen3Model(qwen3_config(num_tokens, 48)),
        }  # fmt: skip
    widen_head(parts["transformer"].all_final_layer["2-1"].linear)
    return write_pipeline(folder, "ZImagePipeline", parts, {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 6.0,
        "use_dynamic_shifting": False,
    }, {
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
    })


def make_pixart(
    folder: str | Path, *, seed: int = 0, sigma: bool = False, transformer_config: Mapping[str, Any] | None = None
) -> Path:
    """Write a PixArt-layout pipeline, of alpha or else of sigma; plain `DiffusionPipeline.from_pretrained` loads it.

    It works on 64x64 pixels in latents of 4x8x8, with 3 transformer blocks. alpha has the transformer's earlier class,
    as it was published.
    """
    import torch
    from diffusers import PixArtTransformer2DModel

    folder = Path(folder)
    num_tokens = write_t5_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "transformer": PixArtTransformer2DModel(**{
                "sample_size": 8,
                "num_layers": 3,
                "attention_head_dim": 16,
                "num_attention_heads": 6,
                "cross_attention_dim": 96,
                "caption_channels": 48,
                **({"use_additional_conditions": False, "interpolation_scale": 2} if sigma else {}),
                **(transformer_config or {}),
            }),
            "vae": make_vae(scaling_factor=0.13025 if sigma else 0.18215),
            "text_encoder": make_t5(num_tokens, 48),
        }
    widen_head(parts["transformer"].proj_out)
    kind = "PixArtTransformer2DModel" if sigma else "Transformer2DModel"
    write_pipeline(folder, "PixArtSigmaPipeline" if sigma else "PixArtAlphaPipeline", parts, {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "solver_order": 2,
        "solver_type": "midpoint",
    }, {
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", kind],
    })
    file = folder / "transformer" / "config.json"
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"_class_name": kind})
    return folder


def make_sana(
    folder: str | Path,
    *,
    seed: int = 0,
    transformer_config: Mapping[str, Any] | None = None,
    scheduler_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a Sana-layout pipeline; plain `SanaPipeline.from_pretrained` loads it.

    It works on 64x64 pixels in latents of 8x8x8, with 3 transformer blocks. `scheduler_config` is in place of that of
    the published models, a DPM-Solver that is told of the flow.
    """
    import torch
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    folder = Path(folder)
    num_tokens = write_gemma_tokenizer(folder / "tokenizer")
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "transformer": SanaTransformer2DModel(**{
                "in_channels": 8,
                "out_channels": 8,
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "num_layers": 3,
                "num_cross_attention_heads": 4,
                "cross_attention_head_dim": 16,
                "cross_attention_dim": 64,
                "caption_channels": 48,
                "sample_size": 8,
                **(transformer_config or {}),
            }),
            "vae": AutoencoderDC(
                latent_channels=8,
                attention_head_dim=8,
                encoder_block_types=blocks,
                decoder_block_types=blocks,
                encoder_block_out_channels=(8, 16, 16, 16),
                decoder_block_out_channels=(8, 16, 16, 16),
                encoder_layers_per_block=(1, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 1, 1),
                encoder_qkv_multiscales=((), (), (), (5,)),
                decoder_qkv_multiscales=((), (), (), (5,)),
                downsample_block_type="Conv",
                upsample_block_type="interpolate",
                scaling_factor=0.41407,
            ),
            "text_encoder": Gemma2Model(Gemma2Config(
                vocab_size=num_tokens,
                hidden_size=48,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=24,
                query_pre_attn_scalar=24,
            )),
        }
    widen_head(parts["transformer"].proj_out)
    scheduler = scheduler_config or {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "flow_shift": 3.0,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "use_flow_sigmas": True,
    }
    return write_pipeline(folder, "SanaPipeline", parts, scheduler, {
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
    })


IF_UNET: dict[str, Any] = {
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "out_channels": 6,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 48,
    "attention_head_dim": 8,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
}
"""What the UNets of both stages of DeepFloyd IF have in common, as diffusers' converter writes it, at tiny width."""
IF_SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range", "prediction_type": "epsilon", "thresholding": True,
    "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5,
}  # fmt: skip


def make_deepfloyd(
    folder: str | Path, *, seed: int = 0, unet_config: Mapping[str, Any] | None = None,
    scheduler_config: Mapping[str, Any] | None = None, **index: Any,
) -> Path:  # fmt: skip
    """Write a pipeline in the layout of DeepFloyd IF's first stage; plain `IFPipeline.from_pretrained` loads it.

    It works on 64x64 pixels, with 8 ResNets, two of which are samplers, and 4 attentions. The checkers and the
    watermark that the published one names are null.
    """
    folder = Path(folder)
    return _write_deepfloyd(folder, "IFPipeline", seed, {"in_channels": 3, **(unet_config or {})},
                            {**IF_SCHEDULER, **(scheduler_config or {})}, index)  # fmt: skip


def make_deepfloyd_upscaler(
    folder: str | Path,
    *,
    seed: int = 1,
    reader: bool = True,
    unet_config: Mapping[str, Any] | None = None,
    **index: Any,
) -> Path:
    """Write a pipeline in the layout of DeepFloyd IF's second stage; `IFSuperResolutionPipeline` loads it.

    It enlarges 16x16 pixels to 64x64. Without a `reader` it goes without its text encoder and tokenizer.
    """
    folder = Path(folder)
    unet = {"in_channels": 6, "class_embed_type": "timestep", "only_cross_attention": True, **(unet_config or {})}
    _write_deepfloyd(folder, "IFSuperResolutionPipeline", seed, unet, {**IF_SCHEDULER, "sample_max_value": 1.0}, {
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
        **({} if reader else {"text_encoder": [None, None], "tokenizer": [None, None]}), **index,
    }, reader)  # fmt: skip
    write_json(
        folder / "image_noising_scheduler" / "scheduler_config.json",
        {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "squaredcos_cap_v2",
        },
    )
    return folder


def _write_deepfloyd(
    folder: Path, pipeline: str, seed: int, unet: Mapping[str, Any], scheduler: Mapping[str, Any],
    index: Mapping[str, Any], reader: bool = True,
) -> Path:  # fmt: skip
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # the text encoder's: both stages have the same
        parts = {"text_encoder": make_t5(write_t5_tokenizer(folder / "tokenizer"), 48)} if reader else {}
        torch.manual_seed(seed)
        parts["unet"] = UNet2DConditionModel(**{"sample_size": 64, **IF_UNET, **unet})
    return write_pipeline(
        folder,
        pipeline,
        parts,
        scheduler,
        {
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "tokenizer": ["transformers", "T5TokenizerFast"],
            "watermarker": [None, None],
            **index,
        },
    )


def write_pipeline(
    folder: Path, name: str, parts: Mapping[str, Any], scheduler: Mapping[str, Any], index: Mapping[str, Any]
) -> Path:
    """Write a pipeline's parts, its scheduler's config, and its index with what the parts do not say of themselves."""
    for part, module in parts.items():
        module.save_pretrained(folder / part)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    kinds = {part: type(module) for part, module in parts.items()}
    classes = {part: [kind.__module__.partition(".")[0], kind.__name__] for part, kind in kinds.items()}
    classes["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(folder / "model_index.json", {"_class_name": name, "_diffusers_version": "0.38.0", **classes, **index})
    return folder


def widen_head(head: Any) -> None:
    """Let a transformer's last layer, which no adapter changes, reach the size of what it has to predict."""
    head.weight.data.mul_(3)


def absent(folder: Path) -> dict[str, None]:
    """What a pipeline has to be told that a folder goes without; others may be left out in silence."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}


def as_asked(pipeline: Any) -> dict[str, bool]:
    """What a pipeline's call has to be told to draw the very size and words that it is given."""
    takes = inspect.signature(pipeline.__call__).parameters
    return {name: False for name in ("use_resolution_binning", "clean_caption") if name in takes}


def make_vae(levels: int = 4, scaling_factor: float | None = 0.18215, kind: Any = None, **config: Any) -> Any:
    """A tiny `AutoencoderKL` that works on latents of 4x8x8, or as many channels as `config` says."""
    from diffusers import AutoencoderKL

    vae = (kind or AutoencoderKL)(
        sample_size=8 * 2 ** (levels - 1),
        block_out_channels=(8, 16, 16, 16)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        **({} if kind else {"scaling_factor": scaling_factor}),
        **{"latent_channels": 4, **config},
    )
    # A random decoder paints everything grey; contrast makes differences between images visible.
    vae.decoder.conv_out.weight.data.mul_(3)
    return vae


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
"""Sizes of a tiny transformer that sees or reads."""
CLIP_PREPROCESSOR = {
    "feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True, "size": 32, "resample": 3,
    "do_center_crop": True, "crop_size": 32, "do_normalize": True, "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}  # fmt: skip
"""In the words of the files on the hub."""


def make_clip(folder: Path, seed: int = 0) -> Path:
    """Write a tiny CLIP that sees and reads, in the layout of transformers; returns the folder."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    words = write_clip_tokenizer(folder)
    ends = {f"{end}_token_id": words["<|endoftext|>"] for end in ("eos", "pad")}
    text = {"vocab_size": len(words), "bos_token_id": words["<|startoftext|>"], **ends, **SMALL}
    seen = {"image_size": 32, "patch_size": 8, **SMALL}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(CLIPConfig(text_config=text, vision_config=seen, projection_dim=12)).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", CLIP_PREPROCESSOR)
    return folder


def make_checker(folder: Path, limits: Sequence[float], care: Sequence[float] = (1, 1, 1), inside: bool = True) -> Path:
    """Write a tiny safety checker, as Stable Diffusion 1.5 has it or alone; returns the folder.

    A picture is flagged where its cosine to a concept is above the concept's limit: always at -1.1, never at 1.1.
    """
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    config = CLIPConfig(
        text_config=SMALL, vision_config={"image_size": 32, "patch_size": 8, **SMALL}, projection_dim=12
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        checker = StableDiffusionSafetyChecker(config)
        for vectors in (checker.concept_embeds, checker.special_care_embeds):
            vectors.data.normal_()
    checker.concept_embeds_weights.data = torch.tensor([*limits, *[1.1] * (17 - len(limits))])
    checker.special_care_embeds_weights.data = torch.tensor([float(limit) for limit in care])
    checker.save_pretrained(folder / "safety_checker" if inside else folder)
    write_json((folder / "feature_extractor" if inside else folder) / "preprocessor_config.json", CLIP_PREPROCESSOR)
    return folder


def clip_config(vocabulary: Mapping[str, int], width: int, act: str, projection_dim: int | None = None) -> Any:
    """Config of a tiny CLIP text encoder of two layers."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection_dim or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=act,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )


def write_clip_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> dict[str, int]:
    """Write a byte-level BPE tokenizer in CLIP's files (vocab.json, merges.txt) and return its vocabulary.

    Every byte is in the vocabulary, so any text can be encoded; the merges are learned from a few words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"end_of_word_suffix": "</w>", "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=800, **options)
    tokenizer.train_from_iterator(WORDS, trainer)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *(a + b for a, b in merges), *SPECIAL]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    })
    return vocabulary


def make_t5(vocab_size: int, width: int) -> Any:
    """A tiny T5 1.1 encoder of two layers."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ))


def write_t5_tokenizer(folder: Path) -> int:
    """Write a Unigram tokenizer in T5's files: a few words, ASCII letters and the sentinels; how many tokens it has."""
    from transformers import T5TokenizerFast

    words = {f"\u2581{word}": -2.0 for word in WORDS} | {chr(code): -8.0 for code in range(33, 127)}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0), *words.items()]
    tokenizer = T5TokenizerFast(vocab=pieces, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def qwen3_config(vocab_size: int, width: int, layers: int = 3, heads: int = 4) -> Any:
    """Config of a tiny Qwen3."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=16,
    )


def qwen2_vl_config(vocab_size: int, width: int) -> Any:
    """Config of a tiny Qwen2.5-VL: a language model of two layers that could also see."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
    )


def mistral3_config(vocab_size: int, width: int) -> Any:
    """Config of a tiny Mistral 3: a language model of 31 layers that could also see."""
    from transformers import Mistral3Config

    small = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2, "head_dim": 8}
    return Mistral3Config(
        text_config={
            "model_type": "mistral", "vocab_size": vocab_size, "num_hidden_layers": 31, "num_key_value_heads": 1,
            "sliding_window": None, **small,
        },
        vision_config={"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28, "patch_size": 14, **small},
        image_token_index=1,
        tie_word_embeddings=False,
    )  # fmt: skip


def write_mistral_tokenizer(folder: Path) -> int:
    """Write a byte-level BPE tokenizer with Mistral's template of chats, padding in front; how many tokens it has."""
    from transformers import PreTrainedTokenizerFast

    trained = train_bytes()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, model_max_length=2048, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens=["[IMG]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
        padding_side="left", chat_template=MISTRAL_CHAT,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def train_bytes() -> Any:
    """A byte-level BPE tokenizer that knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([" ".join(WORDS)], trainer)
    return trained


def write_qwen_tokenizer(folder: Path) -> int:
    """Write a byte-level BPE tokenizer in Qwen's files, with a template of chats; how many tokens it has."""
    from transformers import Qwen2Tokenizer

    model = json.loads(train_bytes().to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"], merges=merges, model_max_length=2048, chat_template=CHAT,
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_gemma_tokenizer(folder: Path) -> int:
    """Write a BPE tokenizer as Gemma's, whose merges are learned from the instruction; how many tokens it has."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import GemmaTokenizerFast

    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581"), "merged_with_next")
    texts = [text.replace(" ", "\u2581") for text in (*WORDS, *sana_instruction())]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(pair) for pair in model["merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    gemma = GemmaTokenizerFast(vocab=vocabulary, merges=merges, add_bos_token=True)
    gemma.save_pretrained(folder)
    return len(gemma)


def sana_instruction() -> list[str]:
    """What Sana's pipeline puts in front of a prompt, line by line."""
    from diffusers import SanaPipeline

    return inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def _legacy_vae(key: str) -> str:
    if "mid_block.attentions" not in key:
        return key
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        key = key.replace(f".{new}.", f".{old}.")
    return key


def write_pictures(folder: Path, sizes: Sequence[tuple[int, int]]) -> None:
    """Pictures of noise in these sizes (width, height), each with a caption, half of them of a dog."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    for i, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"a photo of a {'dog' if i % 2 else 'cat'}"} for i in range(len(sizes))]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def make_gan(
    folder: str | Path, *, kind: str = "Conv", seed: int = 0, normalization: str = "spectral", **config: Any
) -> Path:
    """Write a generator of pictures of 32 pixels and its discriminator, three blocks each; Conv or Residual."""
    import torch

    from gtl.families import gan_conv, gan_residual

    folder, module = Path(folder), {"Conv": gan_conv, "Residual": gan_residual}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = getattr(module, f"{kind}Generator")(noise_size=16, channels=(32, 16, 16, 8), **config)
        generator.save_pretrained(folder / "generator")
        network = getattr(module, f"{kind}Discriminator")(
            channels=(8, 16, 16, 32), normalization=normalization, **config
        )
        network.save_pretrained(folder / "discriminator")
    write_json(folder / "model_index.json", {
        "_class_name": "GanPipeline",
        "generator": ["gtl", f"{kind}Generator"],
        "discriminator": ["gtl", f"{kind}Discriminator"],
    })
    return folder


if __name__ == "__main__":
    import sys

    print(make_sd(sys.argv[1]))


def make_vision(folder: Path, kind: str, side: int = 64) -> Path:
    """Write a tiny network that sees (resnet, vit or dinov2) with its preprocessor, as transformers does."""
    import torch
    from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel, ViTConfig, ViTModel

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": side, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "resnet":
            config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic")
            model: Any = ResNetModel(config)
        elif kind == "vit":
            model = ViTModel(ViTConfig(intermediate_size=32, **small))
        else:
            model = Dinov2Model(Dinov2Config(**small))
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "size": {"height": side, "width": side}, "resample": 2, "rescale_factor": 1 / 255,
        "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3],
    })  # fmt: skip
    return folder
