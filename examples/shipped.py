"""The small models that come with the project, and what suits each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from degu.pipelines import StableDiffusion3DeGuPipeline, StableDiffusionDeGuPipeline, StableDiffusionXLDeGuPipeline

MODELS = Path(__file__).parent / "toyworld" / "models"


@dataclass(frozen=True)
class ShippedModel:
    """Attributes:
    pipeline_class: the family's.
    guidance_scale: w_e; the families' own defaults are too much for models this small.
    steps: of denoising.
    tcam: for `enable_tcam`.
    call_options: what else every call is told.
    train_steps, train_options: for `train_cae.py`.
    """

    pipeline_class: type
    guidance_scale: float = 4.0
    steps: int = 30
    tcam: dict = field(default_factory=dict)
    call_options: dict = field(default_factory=dict)
    train_steps: int = 400
    train_options: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return MODELS / self.pipeline_class._degu_family.name

    def load(self, **components):
        """The pipeline; `components` go to `from_pretrained`."""
        pipe = self.pipeline_class.from_pretrained(self.folder, **components)
        pipe.set_progress_bar_config(disable=True)
        pipe.enable_tcam(**self.tcam)
        return pipe


# On the U-Nets masks are from the 16x16 maps, as large as the latents here; the 8x8 ones are too coarse (sweep.md). The end of a text
# says all that is in it here, as the text encoders were taught, so that [EOT] looks at the subject: masks are from [SOT].
SHIPPED = {
    "sd": ShippedModel(StableDiffusionDeGuPipeline, tcam={"resolutions": (1,)}),
    "sdxl": ShippedModel(StableDiffusionXLDeGuPipeline, tcam={"resolutions": (1,), "token": "sot"}),
    # One set of embeddings for the whole transformer learns more slowly. The first steps of flow matching settle the layout, so masks act
    # from the start; the maps are 8x8. In a transformer of six blocks the first half finds the subject best (sweep_sd3.md).
    "sd3": ShippedModel(
        StableDiffusion3DeGuPipeline,
        tcam={"start": 0.0, "kernel_size": 3, "layers": (0, 1, 2)},
        call_options={"max_sequence_length": 32},
        train_steps=800,
        train_options=("--max_sequence_length", "32"),
    ),
}


def starting_noise(pipe, count: int, seed: int) -> torch.Tensor:
    """The same starting latents for every way of making the pictures, (count, channels, h, w)."""
    config = pipe.unet.config if hasattr(pipe, "unet") else pipe.transformer.config
    shape = count, config.in_channels, config.sample_size, config.sample_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
