"""The frozen Stable Diffusion 1.x / 2.x model that a CAE is trained on."""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch
from diffusers import DDPMScheduler, DiffusionPipeline

from degu.attention_processors import FidelityStream, cross_attention_layers
from degu.pipelines import StableDiffusionDeGuPipeline
from degu.pipelines.cae_encoding import encode_cae
from degu.training.embeddings import noun_embedding
from degu.training.latent_cache import Batch


class StableDiffusionBackbone:
    """Loads the model with no gradients for its weights, and computes its own denoising loss from a CAE alone."""

    family = "sd"

    def __init__(self, pretrained_model_name_or_path: str, revision: str | None, variant: str | None, dtype: torch.dtype, device) -> None:
        # The pipeline's modules also make the validation pictures.
        self.pipeline = StableDiffusionDeGuPipeline.from_pretrained(
            pretrained_model_name_or_path, revision=revision, variant=variant, safety_checker=None, requires_safety_checker=False
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.vae, self.unet = self.pipeline.vae, self.pipeline.unet
        self.text_encoder, self.tokenizer = self.pipeline.text_encoder, self.pipeline.tokenizer
        self.noise_scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        for module in (self.vae, self.unet, self.text_encoder):
            module.requires_grad_(False).eval().to(device, dtype)
        self.layers = cross_attention_layers(self.unet)
        self.layer_names = [layer.name for layer in self.layers]
        self.num_train_timesteps = self.noise_scheduler.config.num_train_timesteps
        self.default_resolution = self.unet.config.sample_size * self.pipeline.vae_scale_factor
        self.resolution_multiple = self.pipeline.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def initial_embeddings(self, noun: str) -> dict[str, torch.Tensor]:
        return {"text_encoder": noun_embedding(self.text_encoder, self.tokenizer, noun)}

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()
        self.unet.train()  # it checkpoints only in training mode; there is no dropout in it

    @contextlib.contextmanager
    def conditioned_on(self, embeddings: dict[str, torch.Tensor], examples: int) -> Iterator[torch.Tensor]:
        """While it lasts, the denoiser sees the CAE sequence and nothing else, every layer its own.

        The backward pass belongs inside: gradient checkpointing evaluates the denoiser a second time.

        Yields:
            What to hand the denoiser as `encoder_hidden_states`: (examples, tokens, dim), replaced in every layer.
        """
        encoded = encode_cae(self.text_encoder, self.tokenizer, embeddings["text_encoder"])
        contexts = {name: encoded[min(i, len(encoded) - 1)][None] for i, name in enumerate(self.layer_names)}
        with FidelityStream(slice(0, examples), contexts).attached(self.layers):
            yield encoded.new_zeros(examples, *encoded.shape[1:])

    def loss(self, condition: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean squared error of the prediction (Eq. 4), noise or velocity as the model was trained; scalar.

        With masks, only what is the subject counts.
        """
        scheduler, dtype = self.noise_scheduler, self.unet.dtype
        latents = batch.latents * self.vae.config.scaling_factor
        noisy = scheduler.add_noise(latents, batch.noise, batch.timesteps)
        predicted = self.unet(noisy.to(dtype), batch.timesteps, condition).sample.float()
        kind = scheduler.config.prediction_type
        if kind == "epsilon":
            target = batch.noise
        elif kind == "v_prediction":
            target = scheduler.get_velocity(latents, batch.noise, batch.timesteps)
        else:
            raise ValueError(f"The model's scheduler predicts {kind!r}; training knows `epsilon` and `v_prediction`.")
        error = (predicted - target).square()
        if batch.masks is None:
            return error.mean()
        return (error * batch.masks).sum() / (batch.masks.sum() * error.shape[1]).clamp_min(1e-6)


def load_backbone(pretrained_model_name_or_path: str, revision: str | None, variant: str | None, dtype: torch.dtype, device):
    """The backbone for the model's family, which its own `model_index.json` tells.

    Raises:
        ValueError: a family that training does not support.
    """
    config = DiffusionPipeline.load_config(pretrained_model_name_or_path, revision=revision)
    name = config.get("_class_name", "")
    if name not in ("StableDiffusionPipeline", "StableDiffusionDeGuPipeline"):
        raise ValueError(f"{pretrained_model_name_or_path} is a {name or 'model of unknown kind'}; training supports StableDiffusionPipeline.")
    return StableDiffusionBackbone(pretrained_model_name_or_path, revision, variant, dtype, device)
