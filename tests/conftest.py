"""Small pipelines with the true architectures and random weights: for mechanics, not for meaning."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach for the network

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from degu.attention_processors import cross_attention_layers
from degu.pipelines import StableDiffusionDeGuPipeline
from degu.pipelines.cae_file import ContextAgnosticEmbeddings

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "examples" / "toyworld" / "models" / "sd"
DIM, DIM_2, TOKENS = 32, 24, 3


def tiny_stock(seed: int = 0, **unet_options) -> StableDiffusionPipeline:
    """SD's layout: four levels, cross-attention in three of them and in the middle, 16 layers in all."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED, subfolder="tokenizer")
    text_encoder = CLIPTextModel(text_config(tokenizer, DIM))
    options = dict(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        cross_attention_dim=DIM,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    unet = with_shapely_attention(UNet2DConditionModel(**(options | unet_options)))
    pipe = StableDiffusionPipeline(tiny_vae(), text_encoder, tokenizer, unet, tiny_scheduler(), None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_stock_xl(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL's layout: two text encoders whose tokenizers pad differently, blocks of one and two layers, pooled text and sizes."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED, subfolder="tokenizer")
    tokenizer_2 = CLIPTokenizer.from_pretrained(SHIPPED, subfolder="tokenizer", pad_token="a</w>")
    assert tokenizer.pad_token_id != tokenizer_2.pad_token_id
    unet = UNet2DConditionModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 16),
        transformer_layers_per_block=(1, 1, 2),
        layers_per_block=1,
        cross_attention_dim=DIM + DIM_2,
        attention_head_dim=(2, 2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + DIM_2,
    )
    pipe = StableDiffusionXLPipeline(
        tiny_vae(), CLIPTextModel(text_config(tokenizer, DIM)), CLIPTextModelWithProjection(text_config(tokenizer_2, DIM_2)),
        tokenizer, tokenizer_2, with_shapely_attention(unet), tiny_scheduler(), add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_config(tokenizer, dim: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=dim, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=dim, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 8),
        norm_num_groups=4, latent_channels=4, layers_per_block=1, sample_size=64,
    )  # fmt: skip


def tiny_scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@torch.no_grad()
def with_shapely_attention(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Random attention is flat; larger weights give it a shape to find masks in."""
    for layer in cross_attention_layers(unet):
        layer.module.to_q.weight.mul_(6)
        layer.module.to_k.weight.mul_(6)
    return unet


def random_cae(pipe, layerwise: bool = True, seed: int = 1) -> ContextAgnosticEmbeddings:
    names = tuple(layer.name for layer in cross_attention_layers(pipe.unet))
    generator = torch.Generator().manual_seed(seed)
    dims = {"text_encoder": DIM} | ({"text_encoder_2": DIM_2} if hasattr(pipe, "text_encoder_2") else {})
    rows = {name: torch.randn(len(names) if layerwise else 1, TOKENS, dim, generator=generator) for name, dim in dims.items()}
    return ContextAgnosticEmbeddings(rows, names if layerwise else (), {"base_model": "tiny", "class_noun": "dog"})


def as_dict(cae: ContextAgnosticEmbeddings) -> dict[str, torch.Tensor]:
    return {f"cae.{name}": rows for name, rows in cae.embeddings.items()}


@pytest.fixture
def stock() -> StableDiffusionPipeline:
    return tiny_stock()


@pytest.fixture
def pipe(stock) -> StableDiffusionDeGuPipeline:
    """Shares its weights with `stock`; no CAE loaded."""
    pipe = StableDiffusionDeGuPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def loaded(pipe) -> StableDiffusionDeGuPipeline:
    pipe.load_cae_embeddings(as_dict(random_cae(pipe)), adapter_name="dog")
    return pipe


def noise(count: int = 1, side: int = 16, seed: int = 0) -> torch.Tensor:
    """Starting latents; row i depends on i alone."""
    return torch.cat([torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)])
