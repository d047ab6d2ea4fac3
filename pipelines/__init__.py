"""Diffusers pipelines with Decoupled Guidance."""

from degu.pipelines.pipeline_degu_sd import StableDiffusionDeGuPipeline
from degu.pipelines.pipeline_degu_sd_xl import StableDiffusionXLDeGuPipeline

__all__ = ["StableDiffusionDeGuPipeline", "StableDiffusionXLDeGuPipeline"]
