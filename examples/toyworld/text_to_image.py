"""What the families differ in when a denoiser is trained: the parts, what it is told, and the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch.nn.functional import avg_pool2d, interpolate
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from toyworld.denoisers import grow, new_transformer, new_unet, new_unet_xl
from toyworld.renderer import SIZE
from toyworld.text_encoders import MAX_LENGTH, with_projection


class Recipe(ABC):
    """A family's stock pipeline with a new denoiser, its other parts read from `models_dir` and frozen."""

    name: str
    folder: str = "unet"  # of the denoiser, in the pipeline's
    denoiser: torch.nn.Module

    def __init__(self, models_dir: Path) -> None:
        self.models_dir = models_dir
        self.vae = self.part("sd", "vae", AutoencoderKL)
        self.tokenizer = CLIPTokenizer.from_pretrained(models_dir / "sd" / "tokenizer")
        self.text_encoder = self.part("sd", "text_encoder", CLIPTextModel)
        self.pipeline = self.new_pipeline()
        self.pipeline.set_progress_bar_config(disable=True)

    def part(self, family: str, folder: str, kind: type) -> torch.nn.Module:
        return kind.from_pretrained(self.models_dir / family / folder).float().eval().requires_grad_(False)

    @abstractmethod
    def new_pipeline(self) -> DiffusionPipeline:
        """Also sets `denoiser`."""

    def start(self, captions: list[str]) -> None:
        """Gives the new denoiser what it need not learn anew; `captions` as they are going to come."""

    @abstractmethod
    def text_states(self, captions: list[str]) -> tuple[torch.Tensor, ...]:
        """By the stock pipeline: (n, tokens, dim), and the pooled ones (n, dim) where the family has them."""

    @abstractmethod
    def loss(self, denoiser, clean: torch.Tensor, texts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Of the scaled latents `clean` (n, channels, h, w), in any float type; `denoiser` may be a compiled one."""


def stratified(count: int) -> torch.Tensor:
    """Random numbers in 0..1 that cover it evenly, for less variance: (count,)."""
    return (torch.randperm(count) + torch.rand(count)) / count


class StableDiffusionRecipe(Recipe):
    """Velocity prediction on a noise schedule that suits latents so small."""

    name = "sd"
    betas = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction", steps_offset=1)

    def new_pipeline(self) -> StableDiffusionPipeline:
        self.denoiser = prepared(new_unet(self.text_encoder.config.hidden_size))
        self.noise = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **self.betas)
        return StableDiffusionPipeline(
            self.vae, self.text_encoder, self.tokenizer, self.denoiser, self.noise, None, None, requires_safety_checker=False
        )

    def text_states(self, captions: list[str]) -> tuple[torch.Tensor]:
        return self.pipeline.encode_prompt(captions, self.denoiser.device, 1, False)[:1]

    def loss(self, denoiser, clean: torch.Tensor, texts: tuple[torch.Tensor, ...], **added) -> torch.Tensor:
        n, noise = len(clean), torch.randn_like(clean)
        # Three in four from the middle, where shapes and patterns are decided.
        t = stratified(n)
        t = torch.where(torch.arange(n) % 4 == 0, t, 0.10 + 0.68 * t)
        t = (t * self.noise.config.num_train_timesteps).long().to(clean.device)
        predicted = denoiser(self.noise.add_noise(clean, noise, t), t, texts[0], **added).sample
        return (predicted.float() - self.noise.get_velocity(clean, noise, t)).pow(2).mean()


class StableDiffusionXLRecipe(StableDiffusionRecipe):
    """Goes on from the trained U-Net of Stable Diffusion, with both text encoders, pooled text and sizes."""

    name = "sdxl"
    small = 0.1  # share of pictures that come from half the size, and say so

    def new_pipeline(self) -> StableDiffusionXLPipeline:
        tokenizer_2 = CLIPTokenizer.from_pretrained(self.models_dir / "sdxl" / "tokenizer_2")
        text_encoder_2 = self.part("sdxl", "text_encoder_2", CLIPTextModelWithProjection)
        pooled = text_encoder_2.config.projection_dim
        self.denoiser = prepared(new_unet_xl(self.text_encoder.config.hidden_size + text_encoder_2.config.hidden_size, pooled))
        self.noise = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **self.betas)
        return StableDiffusionXLPipeline(
            self.vae, self.text_encoder, text_encoder_2, self.tokenizer, tokenizer_2, self.denoiser,
            EulerDiscreteScheduler(timestep_spacing="leading", **self.betas), add_watermarker=False,
        )  # fmt: skip

    @torch.no_grad()
    def start(self, captions: list[str]) -> None:
        """Takes over Stable Diffusion's U-Net, with the linear map from these text states to its own that fits `captions` best."""
        unet = self.part("sd", "unet", UNet2DConditionModel)
        ids = self.tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
        theirs, own = self.text_encoder(ids).last_hidden_state.flatten(0, 1), self.text_states(captions)[0].flatten(0, 1)
        grow(self.denoiser, unet, torch.linalg.lstsq(own.double(), theirs.double()).solution.T.float())

    def text_states(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        states, _, pooled, _ = self.pipeline.encode_prompt(captions, device=self.denoiser.device, do_classifier_free_guidance=False)
        named = torch.tensor([bool(caption) for caption in captions], device=states.device)  # stock gives zeros for an empty one
        return states * named[:, None, None], pooled * named[:, None]

    def loss(self, denoiser, clean: torch.Tensor, texts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        small = torch.rand(len(clean), device=clean.device) < self.small
        clean = torch.where(small[:, None, None, None], interpolate(avg_pool2d(clean, 2), scale_factor=2.0), clean)
        original = torch.where(small, SIZE // 2, SIZE)[:, None].expand(-1, 2)
        sizes = torch.cat([original, torch.tensor([[0, 0, SIZE, SIZE]], device=clean.device).expand(len(clean), -1)], dim=1)
        return super().loss(denoiser, clean, texts, added_cond_kwargs={"text_embeds": texts[1], "time_ids": sizes.to(texts[1].dtype)})


class StableDiffusion3Recipe(Recipe):
    """Flow matching; three text encoders, T5 with at most 32 tokens (`max_sequence_length`).

    Each encoder is left out of part of the pictures, as when SD 3 was trained: else one of them alone is listened to for what all say.
    """

    name = "sd3"
    folder = "transformer"
    encoder_dropout = 0.464

    def new_pipeline(self) -> StableDiffusion3Pipeline:
        tokenizer_2 = CLIPTokenizer.from_pretrained(self.models_dir / "sdxl" / "tokenizer_2")
        tokenizer_3 = T5Tokenizer.from_pretrained(self.models_dir / "sd3" / "tokenizer_3")
        encoders = with_projection(self.text_encoder).eval().requires_grad_(False), self.part("sdxl", "text_encoder_2", CLIPTextModelWithProjection)
        t5 = self.part("sd3", "text_encoder_3", T5EncoderModel)
        self.denoiser = new_transformer(t5.config.d_model, sum(encoder.config.projection_dim for encoder in encoders))
        self.vae.register_to_config(shift_factor=0.0)
        return StableDiffusion3Pipeline(
            self.denoiser, FlowMatchEulerDiscreteScheduler(), self.vae, encoders[0], self.tokenizer, encoders[1], tokenizer_2, t5, tokenizer_3
        )

    def text_states(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            captions, None, None, self.denoiser.device, do_classifier_free_guidance=False, max_sequence_length=MAX_LENGTH
        )
        return states, pooled

    def with_encoders_left_out(self, states: torch.Tensor, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros where an encoder would be, as stock has them for one that is None; drawn for each encoder and picture."""
        first, second = (encoder.config.projection_dim for encoder in (self.pipeline.text_encoder, self.pipeline.text_encoder_2))
        kept_1, kept_2, kept_t5 = (torch.rand(3, len(states), 1, device=states.device) >= self.encoder_dropout).to(states.dtype)
        width, tokens = states.shape[2], states.shape[1] - MAX_LENGTH
        clips = torch.cat([kept_1.expand(-1, first), kept_2.expand(-1, width - first)], 1)  # by channel; what is beyond both is padding
        kept = torch.cat([clips[:, None].expand(-1, tokens, -1), kept_t5[:, None].expand(-1, MAX_LENGTH, width)], 1)
        return states * kept, pooled * torch.cat([kept_1.expand(-1, first), kept_2.expand(-1, second)], 1)

    def loss(self, denoiser, clean: torch.Tensor, texts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        texts = self.with_encoders_left_out(*texts)
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(0.3 + torch.special.ndtri(stratified(len(clean)))).to(clean.device)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        predicted = denoiser(hidden_states=noisy, timestep=1000 * sigma, encoder_hidden_states=texts[0], pooled_projections=texts[1]).sample
        return (predicted.float() - (noise - clean)).pow(2).mean()


def prepared(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    unet.set_attn_processor(AttnProcessor())  # on a CPU, the backward pass of the fused attention is slow in bfloat16
    return unet.to(memory_format=torch.channels_last)


RECIPES = {recipe.name: recipe for recipe in (StableDiffusionRecipe, StableDiffusionXLRecipe, StableDiffusion3Recipe)}
