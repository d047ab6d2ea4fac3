"""Decoupled Guidance for Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from typing import Any, Mapping

import torch
from diffusers import StableDiffusionPipeline

from degu.pipelines.cae_encoding import Sequencer, cae_sequence, encode_cae
from degu.pipelines.degu_mixin import extends
from degu.pipelines.families import SD
from degu.pipelines.hosts.host import Host
from degu.pipelines.output import StableDiffusionDeGuPipelineOutput
from degu.pipelines.unet_mixin import UNetDeGuMixin


class StableDiffusionDeGuPipeline(UNetDeGuMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with a stream of its own for a subject learned as context-agnostic embeddings (CAE).

    Example:

        >>> pipe = StableDiffusionDeGuPipeline.from_pretrained(base)
        >>> pipe.load_cae_embeddings("dog.safetensors")
        >>> image = pipe("a dog in the snow").images[0]
    """

    _degu_family = SD
    _output_class = StableDiffusionDeGuPipelineOutput

    def _text_encoders(self) -> dict[str, tuple]:
        return {"text_encoder": (self.text_encoder, self.tokenizer)}

    def _encode_cae(self, embeddings: Mapping[str, torch.Tensor], sequence: Sequencer = cae_sequence) -> tuple[torch.Tensor, None]:
        return encode_cae(self.text_encoder, self.tokenizer, embeddings["text_encoder"], sequence), None

    @extends(StableDiffusionPipeline.__call__)
    @torch.no_grad()
    def __call__(
        self,
        *args,
        fidelity_guidance_scale: float | None = None,
        host_prompt: str | list[str] | None = None,
        host_prompt_embeds: torch.Tensor | None = None,
        host_guidance_scale: float | None = None,
        host: Host | None = None,
        host_weights: str = "all",
        host_unet: torch.nn.Module | None = None,
        subject_mask: Any = None,
        **kwargs,
    ):
        """Takes all that `StableDiffusionPipeline` takes, with the same meaning, and in addition:

        Args:
            guidance_scale: w_e, how strongly the plain prompt guides.
            fidelity_guidance_scale: w_f, how strongly the loaded subject guides; by default the family's
                (`degu.pipelines.families.SD`). 0 turns the fidelity stream off.
            host_prompt: prompt of a host method that the pipeline has loaded, e.g. with a textual-inversion token or for a
                LoRA; one, or one per prompt. Turns the host stream on; image prompts (IP-Adapter) then go to it alone.
            host_prompt_embeds: instead of `host_prompt`, (prompts or 1, tokens, dim).
            host_guidance_scale: w_h; by default the family's.
            host: a method that diffusers cannot load (`degu.pipelines.hosts.host.Host`), e.g. NeTI; None: what the pipeline has loaded.
            host_weights: where loaded LoRA adapters and Custom Diffusion's weights act: "all" streams, or the "host" stream alone,
                which is then evaluated apart from the others.
            host_unet: a fine-tuned denoiser (DreamBooth) that evaluates the host stream instead of the pipeline's.
            subject_mask: the user's own mask instead of the one read from attention: PIL, array or tensor, (h, w) or
                (images, h, w), 1 or white on the subject.

        Returns:
            `StableDiffusionDeGuPipelineOutput`, or stock's tuple with `return_dict=False`.

        Raises:
            ValueError: a scale without the CAE or host prompt it belongs to; a mask or host prompts of the wrong shape.
        """
        return self._decoupled_call(
            super().__call__,
            args,
            kwargs,
            fidelity_guidance_scale=fidelity_guidance_scale,
            host=host,
            host_texts={"prompt": host_prompt, "prompt_embeds": host_prompt_embeds},
            host_guidance_scale=host_guidance_scale,
            host_weights=host_weights,
            host_denoiser=host_unet,
            subject_mask=subject_mask,
        )
