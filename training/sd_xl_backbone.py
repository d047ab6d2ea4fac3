"""The frozen Stable Diffusion XL model that a CAE is trained on."""

from __future__ import annotations

import argparse

import torch

from degu.pipelines import StableDiffusionXLDeGuPipeline
from degu.pipelines.streams import Condition
from degu.training.latent_cache import Batch
from degu.training.sd_backbone import StableDiffusionBackbone


class StableDiffusionXLBackbone(StableDiffusionBackbone):
    """Adds what SDXL's denoiser is told beside the text: the CAE's pooled embedding, and each view's sizes."""

    pipeline_class = StableDiffusionXLDeGuPipeline
    pipeline_options = {"add_watermarker": False}

    own_arguments = ("set_per",)
    set_per = "transformer"

    def configure(self, args: argparse.Namespace) -> None:
        super().configure(args)
        self.set_per = args.set_per

    @property
    def set_names(self) -> list[str]:
        """By default the transformers, each with all the cross-attention layers in it: 11 in SDXL, where 70 layers each with a set of
        their own are 70 sequences through both text encoders at every step."""
        if self.set_per == "layer":
            return self.layer_names
        return list(dict.fromkeys(name.split(".transformer_blocks.")[0] for name in self.layer_names))

    def predict(self, noisy: torch.Tensor, condition: Condition, batch: Batch) -> torch.Tensor:
        added = {"text_embeds": condition.pooled, "time_ids": batch.sizes}
        return self.denoiser(noisy, batch.timesteps, condition.embeds, added_cond_kwargs=added).sample
