"""The paper's causal experiment: how much of a prompt's cross-attention a learned token takes, against the class noun in its place.

python examples/attention_collapse.py

The Attention Collapse Score of a prompt is the subject token's share of the attention to all of the prompt's content words, each
word's averaged over space, heads, layers and steps (Eq. 1). Prints each prompt's score and writes a heat-map per word.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging as diffusers_logging
from learned import host_of, work_folder
from pictures import enlarged
from PIL import Image
from quickstart import caption_text
from shipped import SHIPPED, starting_noise
from toyworld.references import new_scenes, subject_of

from degu.training.picture_grid import picture_grid

FUNCTION_WORDS = {"a", "an", "the", "in", "on", "at", "of", "with", "by", "wearing"}


class AttentionRecorder(AttnProcessor):
    """Stock's attention; adds up what the prompts' half of the batch pays to each token, averaged over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[int, torch.Tensor] = {}  # by the number of pixels: (n, pixels, tokens)
        self.counts: dict[int, int] = {}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        if encoder_hidden_states is not None:
            half = len(hidden_states) // 2
            query, key = attn.to_q(hidden_states[half:]), attn.to_k(encoder_hidden_states[half:])
            scores = attn.get_attention_scores(attn.head_to_batch_dim(query), attn.head_to_batch_dim(key))
            paid = scores.view(half, attn.heads, *scores.shape[1:]).mean(1)
            pixels = paid.shape[1]
            self.sums[pixels] = self.sums.get(pixels, 0) + paid
            self.counts[pixels] = self.counts.get(pixels, 0) + 1
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    def by_token(self) -> torch.Tensor:
        """(n, tokens): the mean over space, heads, layers and steps."""
        return sum(total.mean(1) for total in self.sums.values()) / sum(self.counts.values())

    def maps(self) -> torch.Tensor:
        """(n, tokens, h, w) at the finest resolution."""
        pixels = max(self.sums)
        side = int(pixels**0.5)
        return (self.sums[pixels] / self.counts[pixels]).transpose(1, 2).unflatten(2, (side, side))


def recorded(pipe, prompts: list[str], **shared) -> tuple[AttentionRecorder, list]:
    recorder, own = AttentionRecorder(), pipe.unet.attn_processors
    pipe.unet.set_attn_processor(recorder)
    try:
        return recorder, pipe(prompts, **shared).images
    finally:
        pipe.unet.set_attn_processor(own)


def collapse_scores(by_token: torch.Tensor, prompts: list[str], subject: str) -> list[float]:
    """The score of each prompt; a word is a token here, which stands one after its place in the prompt."""
    result = []
    for attention, prompt in zip(by_token, prompts):
        words = prompt.split()
        content = {word: float(attention[i + 1]) for i, word in enumerate(words) if word not in FUNCTION_WORDS}
        result.append(content[subject] / sum(content.values()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, nargs="+", default=range(10, 18), help="seeds of the rendered subjects")
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--train_steps", type=int, default=None, help="by default what suits the model")
    parser.add_argument("--output", type=Path, default=Path("output") / "attention_collapse.png")
    parser.add_argument("--work_dir", type=Path, default=None, help="keeps what is trained, to continue from; by default a temporary folder")
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    model = SHIPPED["sd"]
    pipe, found = model.load(), {"class noun": [], "textual inversion": []}
    with work_folder(args.work_dir) as folder:
        for subject in args.subjects:
            noun, prompts = subject_of(subject).kind, [caption_text(fields) for fields in new_scenes(subject, args.scenes)]
            shared = dict(num_inference_steps=model.steps, guidance_scale=model.guidance_scale, latents=starting_noise(pipe, len(prompts), subject))
            pipe.load_textual_inversion(host_of("ti", model, subject, folder, args.train_steps), weight_name="learned_embeds.safetensors", token="<subject>")
            rows, labels = [], []
            for name, word in (("class noun", noun), ("textual inversion", "<subject>")):
                own = [prompt.replace(noun, word, 1) for prompt in prompts]
                recorder, images = recorded(pipe, own, **shared)
                values = collapse_scores(recorder.by_token(), own, word)
                found[name] += values
                print(*(f"{subject} {prompt}: {value:.2f}" for prompt, value in zip(own, values)), sep="\n", flush=True)
                maps = recorder.maps()[0, 1 : len(own[0].split()) + 1]
                rows.append([enlarged(images[0], 96), *(_heat(m / maps.max()) for m in maps)])
                labels.append(f"{own[0]}: {values[0]:.2f}")
            pipe.unload_textual_inversion()
            if subject == args.subjects[0]:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                picture_grid(rows, ["picture", *prompts[0].split()], labels, side=96).save(args.output)
    for name, values in found.items():
        print(f"{name}: median Attention Collapse Score {np.median(values):.2f}, above 0.8 in {np.mean(np.array(values) > 0.8):.0%} of {len(values)} prompts")


def _heat(attention: torch.Tensor) -> Image.Image:
    return enlarged((attention.clamp(0, 1) * 255).byte().numpy(), 96)


if __name__ == "__main__":
    main()
