"""The published architectures at full size, without their weights: what is measured on them needs none."""

from __future__ import annotations

import itertools

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel


def unet_2_1() -> UNet2DConditionModel:
    """Stable Diffusion 2.1's, for 768 px."""
    return UNet2DConditionModel(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True, upcast_attention=True
    )


def unet_xl() -> UNet2DConditionModel:
    """SDXL's, for 1024 px."""
    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def transformer_3_5_medium() -> SD3Transformer2DModel:
    """SD 3.5 medium's, for 1024 px; its first blocks have a second attention, of the picture alone."""
    return _transformer_3_5(24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)))


def transformer_3_5_large() -> SD3Transformer2DModel:
    """SD 3.5 large's, for 1024 px."""
    return _transformer_3_5(38, pos_embed_max_size=192)


def _transformer_3_5(depth: int, **options) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=depth,
        num_attention_heads=depth,
        attention_head_dim=64,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        caption_projection_dim=64 * depth,
        qk_norm="rms_norm",
        **options,
    )


# The family of each, and what builds it.
FULL_SIZE = {
    "sd-2.1": ("sd", unet_2_1),
    "sdxl": ("sdxl", unet_xl),
    "sd-3.5-medium": ("sd3", transformer_3_5_medium),
    "sd-3.5-large": ("sd3", transformer_3_5_large),
}


@torch.no_grad()
def with_random_weights(build, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The denoiser that `build` builds, made where and as it is wanted: SD 3.5 large in float32 first would be 33 GB."""
    with torch.device("meta"):
        denoiser = build()
    denoiser = denoiser.to(dtype).to_empty(device=device)
    for tensor in itertools.chain(denoiser.parameters(), denoiser.buffers()):
        tensor.normal_(std=0.02)
    return denoiser
