"""The models of `gtl bench` at tiny width: what is other in their configs. All else is as it is in the bench."""

from typing import Any

VAE = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 8}
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
UNET = {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "cross_attention_dim": 32, "sample_size": 16}

TWINS: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "unet": {"block_out_channels": [32, 32], "cross_attention_dim": 32, "sample_size": 8},
        "vae": VAE, "text_encoder": CLIP,
    },
    "sd15": {"unet": UNET, "vae": VAE, "text_encoder": CLIP},
    "sd2": {"unet": {**UNET, "attention_head_dim": [1, 2, 2, 4]}, "vae": VAE, "text_encoder": CLIP},
    "sdxl": {
        "unet": {
            "block_out_channels": [32, 32, 64], "layers_per_block": 1, "cross_attention_dim": 32 + 48,
            "attention_head_dim": [1, 2, 4], "transformer_layers_per_block": [1, 1, 2], "sample_size": 16,
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 24,
        },
        "vae": VAE, "text_encoder": CLIP,
        "text_encoder_2": {**CLIP, "hidden_size": 48, "projection_dim": 24},
    },
    "flux": {
        "transformer": {
            "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
            "joint_attention_dim": 48, "pooled_projection_dim": 32, "axes_dims_rope": [4, 6, 6],
        },
        "vae": {**VAE, "sample_size": 64}, "text_encoder": CLIP,
        "text_encoder_2": {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    },
}  # fmt: skip
