"""The pipelines' outputs: stock's, and the masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput


@dataclass
class StableDiffusionDeGuPipelineOutput(StableDiffusionPipelineOutput):
    """Stock's output and, where masks were used, `subject_masks`: the last step's, (images, h, w) of 0 and 1 at latent size."""

    subject_masks: torch.Tensor | None = None


@dataclass
class StableDiffusionXLDeGuPipelineOutput(StableDiffusionXLPipelineOutput):
    """The same for SDXL."""

    subject_masks: torch.Tensor | None = None


@dataclass
class StableDiffusion3DeGuPipelineOutput(StableDiffusion3PipelineOutput):
    """The same for SD 3."""

    subject_masks: torch.Tensor | None = None
