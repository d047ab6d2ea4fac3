"""Diffusers pipelines with Decoupled Guidance."""

from degu.pipelines.pipeline_degu_sd import StableDiffusionDeGuPipeline

__all__ = ["StableDiffusionDeGuPipeline"]
