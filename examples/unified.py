"""The baseline that DeGu is compared with: the same learned embeddings inside the prompt, one stream for everything."""

from __future__ import annotations

from typing import Mapping

import torch

from degu.pipelines import StableDiffusionDeGuPipeline
from degu.pipelines.cae_encoding import encode_with_rows


class UnifiedPromptPipeline(StableDiffusionDeGuPipeline):
    """Writes the subject's embeddings where the prompt has the class noun, as textual inversion and P+ do."""

    def generate(self, prompts: list[str], noun: str, guidance_scale: float, **kwargs) -> list:
        """Pictures by stock's classifier-free guidance on "a V_1 ... V_N in the snow"; one prompt after another.

        Guidance on one stream is the mixer's formula with that stream alone, so the "fidelity" stream carries the
        unified prompt here, at scale `guidance_scale`, without a mask and with nothing beside it.
        """
        self.disable_tcam()
        images, generators, latents = [], kwargs.pop("generator", None), kwargs.pop("latents", None)
        for i, prompt in enumerate(prompts):
            self._unified = (prompt, noun)
            own = {"generator": generators and generators[i], "latents": None if latents is None else latents[i : i + 1]}
            images += self(prompt, guidance_scale=0.0, fidelity_guidance_scale=guidance_scale, **own, **kwargs).images
        return images

    def _encode_cae(self, embeddings: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, None]:
        prompt, noun = self._unified
        tokenizer, rows = self.tokenizer, embeddings["text_encoder"]
        before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in prompt.split(noun, 1))
        ids = [tokenizer.bos_token_id, *before, *[before[0]] * rows.shape[1], *after][: tokenizer.model_max_length - 1]
        ids += [tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids))
        positions = slice(1 + len(before), 1 + len(before) + rows.shape[1])
        return encode_with_rows(self.text_encoder, tokenizer, torch.tensor(ids), positions, rows)[0], None
