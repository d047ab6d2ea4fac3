"""The frozen Stable Diffusion 3 or 3.5 model that a CAE is trained on."""

from __future__ import annotations

import argparse
import contextlib
import math
from typing import Iterator

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3

from degu.pipelines import StableDiffusion3DeGuPipeline
from degu.pipelines.streams import Condition
from degu.training.latent_cache import Batch
from degu.training.sd_backbone import StableDiffusionBackbone, masked_mean


class StableDiffusion3Backbone(StableDiffusionBackbone):
    """One set of embeddings for the whole transformer, and the flow-matching loss."""

    pipeline_class = StableDiffusion3DeGuPipeline
    pipeline_options: dict = {}
    scheduler_class = FlowMatchEulerDiscreteScheduler
    default_optimizer = "prodigy"  # the paper's for this family

    own_arguments = ("weighting_scheme", "max_sequence_length")

    @property
    def resolution_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.denoiser.config.patch_size

    @property
    def set_names(self) -> list[str]:
        return ["transformer"]

    def configure(self, args: argparse.Namespace) -> None:
        super().configure(args)
        self.scheme, self.logit_mean, self.logit_std, self.mode_scale = args.weighting_scheme, args.logit_mean, args.logit_std, args.mode_scale
        self.max_sequence_length = args.max_sequence_length or 256

    @property
    def call_options(self) -> dict:
        return {"max_sequence_length": self.max_sequence_length}

    @contextlib.contextmanager
    def conditioned_on(self, embeddings: dict[str, torch.Tensor], examples: int) -> Iterator[Condition]:
        embeds, pooled = self.pipeline._encode_cae(embeddings, t5_length=self.max_sequence_length)
        yield Condition(embeds.expand(examples, -1, -1), pooled.expand(examples, -1))

    def loss(self, condition: Condition, batch: Batch) -> torch.Tensor:
        """Mean squared error of the velocity, noise - latents, on the straight line between the two; scalar.

        Weighted, or with timesteps drawn more densely in places, as diffusers' SD 3 scripts do (`--weighting_scheme`).
        """
        scheduler, config = self.noise_scheduler, self.vae.config
        latents = (batch.latents - config.shift_factor) * config.scaling_factor
        steps = self._drawn(batch.timesteps)
        sigmas, timesteps = (values.to(steps.device)[steps] for values in (scheduler.sigmas, scheduler.timesteps))
        sigmas = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - sigmas) * latents + sigmas * batch.noise
        predicted = self.denoiser(
            hidden_states=noisy.to(self.denoiser.dtype), timestep=timesteps, encoder_hidden_states=condition.embeds, pooled_projections=condition.pooled
        ).sample.float()
        error = (predicted - (batch.noise - latents)).square()
        return masked_mean(error * compute_loss_weighting_for_sd3(self.scheme, sigmas), batch.masks)

    def _drawn(self, uniform: torch.Tensor) -> torch.Tensor:
        """Step numbers 0 ... T - 1 of the scheme's density from uniform ones: its inverse distribution function, so that examples
        still depend on their number alone."""
        count = self.num_train_timesteps
        u = (uniform + 0.5) / count
        if self.scheme == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
        elif self.scheme == "mode":
            u = 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return (u * count).long().clamp_(0, count - 1)
