"""The denoisers in small: the U-Nets of Stable Diffusion and SDXL, and the transformer of SD 3.5."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from toyworld.renderer import SIZE

LATENT_SIDE, LATENT_CHANNELS = SIZE // 4, 8
_UNET = dict(
    sample_size=LATENT_SIDE,
    in_channels=LATENT_CHANNELS,
    out_channels=LATENT_CHANNELS,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(64, 128, 160),
    layers_per_block=1,
    attention_head_dim=(2, 4, 5),  # the number of heads, of 32 channels each: diffusers' old name for it
    norm_num_groups=16,
    use_linear_projection=True,
)


def new_unet(text_dim: int) -> UNet2DConditionModel:
    """Cross-attention at 16x16, 8x8 and 4x4; the decoder's, which carry the masks, at 16x16 and 8x8."""
    return UNet2DConditionModel(**_UNET, cross_attention_dim=text_dim)


def new_unet_xl(text_dim: int, pooled_dim: int) -> UNet2DConditionModel:
    """As SDXL's: told pooled text and sizes too, and with several layers in a transformer; 11 layers in 7 transformers."""
    return UNet2DConditionModel(
        **_UNET,
        cross_attention_dim=text_dim,
        transformer_layers_per_block=(1, 2, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + pooled_dim,
    )


def new_transformer(text_dim: int, pooled_dim: int) -> SD3Transformer2DModel:
    """As SD 3.5's, with normalised queries and keys; 8x8 patches."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=text_dim,
        caption_projection_dim=192,
        pooled_projection_dim=pooled_dim,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )


@torch.no_grad()
def grow(unet_xl: UNet2DConditionModel, unet: UNet2DConditionModel, translation: torch.Tensor) -> None:
    """Gives `unet_xl` all that `unet` knows: at first it predicts the same, from its own text states.

    Layers that `unet` lacks start as the identity, and so does what is new about the conditioning.

    Args:
        translation: (dim, text_dim), from `unet_xl`'s text states to what `unet` would have read instead.
    """
    known, own = unet.state_dict(), unet_xl.state_dict()
    for name, tensor in own.items():
        if name not in known:
            if name.endswith(("to_out.0.weight", "to_out.0.bias", "ff.net.2.weight", "ff.net.2.bias")) or name.startswith("add_embedding.linear_2"):
                tensor.zero_()
        elif known[name].shape == tensor.shape:
            tensor.copy_(known[name])
        else:
            tensor.copy_(known[name] @ translation)
