"""Small pipelines with the true architectures and random weights: for mechanics, not for meaning."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach for the network

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from degu.attention_processors import cross_attention_layers
from degu.pipelines import StableDiffusion3DeGuPipeline, StableDiffusionDeGuPipeline, StableDiffusionXLDeGuPipeline
from degu.pipelines.cae_file import ContextAgnosticEmbeddings
from degu.pipelines.self_contained import self_contained_source

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "examples" / "toyworld" / "models" / "sd"
DIM, DIM_2, DIM_3, TOKENS = 32, 24, 64, 3


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


def tiny_stock_3(seed: int = 0, t5: bool = True, version: str = "3.5") -> StableDiffusion3Pipeline:
    """Two CLIPs and a T5, flow matching; in 3.5 normalised queries and keys, and a second attention in some blocks."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED, subfolder="tokenizer")
    words = "a dog cat mug fish red in the on at snow beach night".split()
    tokenizer_3 = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -1.0) for w in words), ("▁", -2.0)], extra_ids=0, model_max_length=64)
    clips = [CLIPTextModelWithProjection(text_config(tokenizer, dim)) for dim in (DIM, DIM_2)]
    text_encoder_3 = T5EncoderModel(T5Config(vocab_size=len(tokenizer_3), d_model=DIM_3, d_kv=8, d_ff=32, num_layers=2, num_heads=4)).eval()
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=DIM_3,
        caption_projection_dim=16, pooled_projection_dim=DIM + DIM_2, pos_embed_max_size=24, dual_attention_layers=(0, 1, 2) if version == "3.5" else (), qk_norm="rms_norm" if version == "3.5" else None,
    )  # fmt: skip
    with torch.no_grad():
        for block in transformer.transformer_blocks:  # as in `with_shapely_attention`; norms, where there are any, set the scale
            (block.attn.norm_added_q or block.attn.add_q_proj).weight.mul_(4)
    vae = tiny_vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)
    pipe = StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, clips[0], tokenizer, clips[1], tokenizer,
        text_encoder_3 if t5 else None, tokenizer_3 if t5 else None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_config(tokenizer, dim: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=dim, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=dim, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def tiny_vae(**options) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 8),
        norm_num_groups=4, latent_channels=4, layers_per_block=1, sample_size=64, **options,
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
    layerwise = layerwise and hasattr(pipe, "unet")
    names = tuple(layer.name for layer in cross_attention_layers(pipe.unet)) if layerwise else ()
    generator = torch.Generator().manual_seed(seed)
    dims = {"text_encoder": DIM, "text_encoder_2": DIM_2, "text_encoder_3": DIM_3}
    dims = {name: dim for name, dim in dims.items() if getattr(pipe, name, None) is not None}
    rows = {name: torch.randn(len(names) if layerwise else 1, TOKENS, dim, generator=generator) for name, dim in dims.items()}
    return ContextAgnosticEmbeddings(rows, names, {"base_model": "tiny", "class_noun": "dog"})


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


FAMILIES = {
    "sd": (tiny_stock, StableDiffusionDeGuPipeline, 16, "host_unet"),
    "sdxl": (tiny_stock_xl, StableDiffusionXLDeGuPipeline, 32, "host_unet"),
    "sd3": (tiny_stock_3, StableDiffusion3DeGuPipeline, 16, "host_transformer"),
}


def with_subject(family: str, weights=lambda module: None):
    """A pipeline with a CAE; `weights` changes its denoiser first."""
    stock, cls, side, _ = FAMILIES[family]
    pipe = cls.from_pipe(stock())
    pipe.set_progress_bar_config(disable=True)
    if family == "sdxl":
        pipe.enable_tcam(resolutions=(1 / 2,))
    weights(pipe._denoiser)
    pipe.load_cae_embeddings(as_dict(random_cae(pipe)))
    return pipe


def latents_of(pipe, **kwargs):
    side = pipe._denoiser.config.sample_size
    return pipe("a dog in the snow", num_inference_steps=3, output_type="latent", latents=noise(side=side), **kwargs).images


def close(made: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def load_random_ip_adapter(pipe) -> None:
    """An image prompt for a U-Net, as `load_ip_adapter` would load its weights; embeddings of (1, DIM) per picture."""
    torch.manual_seed(3)
    config = CLIPVisionConfig(hidden_size=DIM, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16, projection_dim=DIM)
    pipe.register_modules(image_encoder=CLIPVisionModelWithProjection(config))
    weights, index, dim = {}, 1, pipe.unet.config.cross_attention_dim
    for name, processor in pipe.unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            module = pipe.unet.get_submodule(name.removesuffix(".processor"))
            for key in ("to_k_ip", "to_v_ip"):
                weights[f"{index}.{key}.weight"] = torch.randn(module.to_k.out_features, dim)
        index += 2 if name.endswith("attn2.processor") else 0
    projection = {"proj.weight": torch.randn(4 * dim, DIM), "proj.bias": torch.zeros(4 * dim), "norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    pipe.set_ip_adapter_scale(1.0)


def load_random_ip_adapter_3(pipe) -> None:
    """An image prompt for SD 3's transformer; embeddings of (1, 4, 6) per picture."""
    torch.manual_seed(3)
    options = {"hidden_size": 16, "ip_hidden_states_dim": 16, "head_dim": 8, "timesteps_emb_dim": 16, "scale": 1.0}
    for block in pipe.transformer.transformer_blocks:
        block.attn.processor = SD3IPAdapterJointAttnProcessor2_0(**options)
    pipe.transformer.image_proj = IPAdapterTimeImageProjection(
        embed_dim=6, output_dim=16, hidden_dim=16, depth=1, dim_head=8, heads=2, num_queries=4, timestep_in_dim=16
    )


def load_as_custom_pipeline(model: Path, name: str, cls: type, folder: Path, self_contained: bool) -> None:
    """In another process, from another working directory and with an empty module cache, loads and calls `pipelines/<name>.py`: the
    file in the checkout, or the generated one where `degu` cannot be imported."""
    file, without = ROOT / "pipelines" / f"{name}.py", ""
    if self_contained:
        file, without = folder / f"{name}.py", "sys.modules['degu'] = None"
        file.write_text(self_contained_source(f"degu.pipelines.{name}"))
    script = f"""
        import sys
        {without}
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained({str(model)!r}, custom_pipeline={str(file)!r}, trust_remote_code=True)
        assert type(pipe).__name__ == {cls.__name__!r}, type(pipe)
        assert pipe.get_list_cae_adapters() == []
        print("loaded", len(pipe("a dog", num_inference_steps=1).images))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(folder)})
    assert "loaded 1" in run.stdout, run.stderr
