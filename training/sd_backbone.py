"""The frozen Stable Diffusion 1.x / 2.x model that a CAE is trained on."""

from __future__ import annotations

import argparse
import contextlib
from typing import Iterator, Sequence

import torch
from diffusers import DDPMScheduler

from degu.attention_processors import LayerwiseStream
from degu.pipelines import StableDiffusionDeGuPipeline
from degu.pipelines.cae_encoding import Sequencer, cae_sequence
from degu.pipelines.cae_file import ContextAgnosticEmbeddings, rows_by_layer
from degu.pipelines.streams import Condition
from degu.training.embeddings import noun_embedding
from degu.training.latent_cache import Batch

# Arguments that are not for every family, and what they are where they are not given.
FAMILY_ARGUMENTS = {"weighting_scheme": "none", "max_sequence_length": None, "set_per": "transformer"}


class StableDiffusionBackbone:
    """Loads the model with no gradients for its weights, and computes its own denoising loss from a CAE alone.

    Denoiser and text encoders have the given dtype; the VAE stays float32 for encoding. `components` go to `from_pretrained`: None for
    one that is left out.
    """

    pipeline_class: type = StableDiffusionDeGuPipeline
    pipeline_options: dict = {"safety_checker": None, "requires_safety_checker": False}
    scheduler_class: type = DDPMScheduler
    default_optimizer = "adamw"
    own_arguments: tuple[str, ...] = ()  # of `FAMILY_ARGUMENTS`
    call_options: dict = {}  # of the validation pictures

    def __init__(self, pretrained_model_name_or_path: str, revision: str | None, variant: str | None, dtype: torch.dtype, device, **components) -> None:
        # The pipeline's modules also make the validation pictures.
        self.pipeline = self.pipeline_class.from_pretrained(
            pretrained_model_name_or_path, revision=revision, variant=variant, **self.pipeline_options, **components
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.family = self.pipeline._degu_family.name
        self.vae, self.denoiser, self.text_encoders = self.pipeline.vae, self.pipeline._denoiser, self.pipeline._text_encoders()
        self.noise_scheduler = self.scheduler_class.from_config(self.pipeline.scheduler.config)
        for module in (self.denoiser, *(encoder for encoder, _ in self.text_encoders.values())):
            module.requires_grad_(False).eval().to(device, dtype)
        self.vae.requires_grad_(False).eval().to(device, torch.float32)
        self.layers = self.pipeline._layers()
        self.layer_names = [layer.name for layer in self.layers]
        self.num_train_timesteps = self.noise_scheduler.config.num_train_timesteps
        self.default_resolution = self.denoiser.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def resolution_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    @property
    def set_names(self) -> list[str]:
        """The modules that have a set of embeddings of their own: every cross-attention layer."""
        return self.layer_names

    def configure(self, args: argparse.Namespace) -> None:
        """Takes over the arguments that only some families have.

        Raises:
            ValueError: one that this family does not have.
        """
        for name, default in FAMILY_ARGUMENTS.items():
            if name not in self.own_arguments and getattr(args, name) != default:
                raise ValueError(f"`--{name} {getattr(args, name)}` is for other model families; this is {self.family!r}.")

    def initial_embeddings(self, noun: str) -> dict[str, torch.Tensor]:
        return {name: noun_embedding(*encoder, noun) for name, encoder in self.text_encoders.items()}

    def enable_gradient_checkpointing(self) -> None:
        self.denoiser.enable_gradient_checkpointing()
        self.denoiser.train()  # U-Nets checkpoint only in training mode; there is no dropout in them

    @contextlib.contextmanager
    def conditioned_on(
        self, embeddings: dict[str, torch.Tensor], examples: int, sequences: Sequence[Sequencer] = (cae_sequence,)
    ) -> Iterator[Condition]:
        """While it lasts, the denoiser sees the embeddings in their sequence and nothing else, every layer its own.

        The backward pass belongs inside: gradient checkpointing evaluates the denoiser a second time.

        Args:
            sequences: one, or one for each of the `examples`.

        Yields:
            What to hand the denoiser for `examples` rows; its `embeds` are replaced in every layer.
        """
        sets = rows_by_layer(ContextAgnosticEmbeddings(embeddings, tuple(self.set_names)), self.layer_names)
        contexts, pooled = self.pipeline._encode_layers(embeddings, sets, sequences)
        any_context = contexts[self.layer_names[0]]
        with LayerwiseStream(slice(0, examples), contexts).attached(self.layers):
            yield Condition(any_context.new_zeros(examples, *any_context.shape[1:]), None if pooled is None else pooled.expand(examples, -1))

    def predict(self, noisy: torch.Tensor, condition: Condition, batch: Batch) -> torch.Tensor:
        """The denoiser's prediction for noisy latents, of their shape."""
        return self.denoiser(noisy, batch.timesteps, condition.embeds).sample

    def noisy(self, batch: Batch) -> torch.Tensor:
        """The scaled latents with their noise, as the denoiser takes them."""
        return self.noise_scheduler.add_noise(batch.latents * self.vae.config.scaling_factor, batch.noise, batch.timesteps).to(self.denoiser.dtype)

    def loss(self, condition: Condition, batch: Batch) -> torch.Tensor:
        """Mean squared error of the prediction (Eq. 4), noise or velocity as the model was trained; scalar."""
        scheduler = self.noise_scheduler
        latents = batch.latents * self.vae.config.scaling_factor
        predicted = self.predict(self.noisy(batch), condition, batch).float()
        kind = scheduler.config.prediction_type
        if kind == "epsilon":
            target = batch.noise
        elif kind == "v_prediction":
            target = scheduler.get_velocity(latents, batch.noise, batch.timesteps)
        else:
            raise ValueError(f"The model's scheduler predicts {kind!r}; training knows `epsilon` and `v_prediction`.")
        return masked_mean((predicted - target).square(), batch.masks)


def masked_mean(error: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
    """The mean of `error` (n, channels, h, w); with masks (n, 1, h, w) only of what is the subject."""
    if masks is None:
        return error.mean()
    return (error * masks).sum() / (masks.sum() * error.shape[1]).clamp_min(1e-6)
