"""Decoupled Guidance for Stable Diffusion XL."""

from __future__ import annotations

from typing import Any, Mapping

import torch
from diffusers import StableDiffusionXLPipeline

from degu.pipelines.cae_encoding import Sequencer, cae_sequence, encode_cae_xl
from degu.pipelines.degu_mixin import extends
from degu.pipelines.families import SDXL
from degu.pipelines.hosts.host import Host
from degu.pipelines.output import StableDiffusionXLDeGuPipelineOutput
from degu.pipelines.unet_mixin import UNetDeGuMixin


class StableDiffusionXLDeGuPipeline(UNetDeGuMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with a stream of its own for a subject learned as context-agnostic embeddings (CAE).

    The fidelity stream has the CAE's own pooled embedding and the prompt's sizes (`original_size`, `target_size`, crop).

    Example:

        >>> pipe = StableDiffusionXLDeGuPipeline.from_pretrained(base)
        >>> pipe.load_cae_embeddings("dog.safetensors")
        >>> image = pipe("a dog in the snow").images[0]
    """

    _degu_family = SDXL
    _output_class = StableDiffusionXLDeGuPipelineOutput

    def _text_encoders(self) -> dict[str, tuple]:
        if self.text_encoder is None or self.text_encoder_2 is None:
            raise ValueError("A CAE is encoded by both text encoders of SDXL, but this pipeline was loaded without one of them.")
        return {"text_encoder": (self.text_encoder, self.tokenizer), "text_encoder_2": (self.text_encoder_2, self.tokenizer_2)}

    def _encode_cae(self, embeddings: Mapping[str, torch.Tensor], sequence: Sequencer = cae_sequence) -> tuple[torch.Tensor, torch.Tensor]:
        encoders = self._text_encoders()
        return encode_cae_xl(list(encoders.values()), [embeddings[name] for name in encoders], sequence)

    @extends(StableDiffusionXLPipeline.__call__)
    @torch.no_grad()
    def __call__(
        self,
        *args,
        fidelity_guidance_scale: float | None = None,
        host_prompt: str | list[str] | None = None,
        host_prompt_2: str | list[str] | None = None,
        host_prompt_embeds: torch.Tensor | None = None,
        host_pooled_prompt_embeds: torch.Tensor | None = None,
        host_guidance_scale: float | None = None,
        host: Host | None = None,
        host_weights: str = "all",
        host_unet: torch.nn.Module | None = None,
        subject_mask: Any = None,
        **kwargs,
    ):
        """Takes all that `StableDiffusionXLPipeline` takes, with the same meaning, and in addition:

        Args:
            guidance_scale: w_e, how strongly the plain prompt guides.
            fidelity_guidance_scale: w_f, how strongly the loaded subject guides; by default the family's
                (`degu.pipelines.families.SDXL`). 0 turns the fidelity stream off.
            host_prompt, host_prompt_2: prompt of a host method that the pipeline has loaded, for the first and (by default the
                same) second text encoder; one, or one per prompt. Turns the host stream on; image prompts (IP-Adapter)
                then go to it alone.
            host_prompt_embeds, host_pooled_prompt_embeds: instead, (prompts or 1, tokens, dim) and (prompts or 1, dim).
            host_guidance_scale: w_h; by default the family's.
            host: a method that diffusers cannot load (`degu.pipelines.hosts.host.Host`), e.g. NeTI; None: what the pipeline has loaded.
            host_weights: where loaded LoRA adapters and Custom Diffusion's weights act: "all" streams, or the "host" stream alone,
                which is then evaluated apart from the others.
            host_unet: a fine-tuned denoiser (DreamBooth) that evaluates the host stream instead of the pipeline's.
            subject_mask: the user's own mask instead of the one read from attention: PIL, array or tensor, (h, w) or
                (images, h, w), 1 or white on the subject.

        Returns:
            `StableDiffusionXLDeGuPipelineOutput`, or stock's tuple with `return_dict=False`.

        Raises:
            ValueError: a scale without the CAE or host prompt it belongs to; a mask or host prompts of the wrong shape.
        """
        texts = {
            "prompt": host_prompt,
            "prompt_2": host_prompt_2,
            "prompt_embeds": host_prompt_embeds,
            "pooled_prompt_embeds": host_pooled_prompt_embeds,
        }
        return self._decoupled_call(
            super().__call__,
            args,
            kwargs,
            fidelity_guidance_scale=fidelity_guidance_scale,
            host=host,
            host_texts=texts,
            host_guidance_scale=host_guidance_scale,
            host_weights=host_weights,
            host_denoiser=host_unet,
            subject_mask=subject_mask,
        )
