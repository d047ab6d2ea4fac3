"""Diffusers pipelines with Decoupled Guidance."""

from degu.pipelines.pipeline_degu_sd import StableDiffusionDeGuPipeline
from degu.pipelines.pipeline_degu_sd_3 import StableDiffusion3DeGuPipeline
from degu.pipelines.pipeline_degu_sd_xl import StableDiffusionXLDeGuPipeline

__all__ = ["StableDiffusion3DeGuPipeline", "StableDiffusionDeGuPipeline", "StableDiffusionXLDeGuPipeline"]
