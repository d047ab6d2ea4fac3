"""How a prompt reaches Stable Diffusion 3, with the class noun and with the CAE in its place.

python examples/text_pathways.py

A U-Net hears a prompt above all in its text tokens. SD 3's transformer hears it three times: in CLIP's tokens, in T5's tokens, and in the
pooled CLIP embeddings that modulate every block. Here each of them speaks alone, the others left out as stock leaves out a text encoder
that it does not have, with zeros; the oracle reads subject and scene back.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from learned import add_arguments, trained, work_folder
from quickstart import caption_text
from shipped import SHIPPED, starting_noise
from toyworld.oracle import Oracle
from toyworld.references import new_scenes, reference_pictures, rendered, subject_of
from toyworld.scores import scores, table

from degu.pipelines.cae_encoding import prompt_with_embeddings

# Which of CLIP's tokens, T5's tokens and the pooled embeddings are heard.
PATHWAYS = {
    "all three": (True, True, True),
    "without T5": (True, False, True),
    "CLIP's tokens alone": (True, False, False),
    "the pooled embeddings alone": (False, False, True),
    "T5's tokens alone": (False, True, False),
}
T5_LENGTH = SHIPPED["sd3"].call_options["max_sequence_length"]

Text = tuple[torch.Tensor, torch.Tensor]  # both CLIPs' tokens and then T5's, (n, tokens, dim); pooled, (n, dim)


@torch.no_grad()
def plain(pipe, prompts: list[str]) -> Text:
    states, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH)
    return states, pooled


@torch.no_grad()
def with_cae(pipe, prompts: list[str], noun: str) -> Text:
    """The prompts with the loaded CAE in the place of the noun."""
    sequences = [prompt_with_embeddings(prompt.replace(noun, "<subject>", 1), "<subject>") for prompt in prompts]
    encoded = [pipe._encode_cae(pipe.active_cae.embeddings, sequence, T5_LENGTH) for sequence in sequences]
    states, pooled = (torch.cat(parts) for parts in zip(*encoded))
    return states, pooled


def heard(text: Text, clip: bool, t5: bool, pooled: bool) -> Text:
    """`text` with zeros for what is not heard."""
    states = torch.cat([text[0][:, :-T5_LENGTH] * clip, text[0][:, -T5_LENGTH:] * t5], 1)
    return states, text[1] * pooled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    model, oracle = SHIPPED["sd3"], Oracle.load()
    pipe = model.load()
    collected: dict[str, list[dict[str, float]]] = {}
    with work_folder(args.work_dir) as folder:
        for subject in args.subjects:
            pipe.load_cae_embeddings(trained(model, subject, folder, args.train_steps), adapter_name="subject")
            identity, references, fields = subject_of(subject), rendered(reference_pictures(subject)), new_scenes(subject, args.scenes) * args.seeds
            prompts = [caption_text(f) for f in fields]
            noise, empty = starting_noise(pipe, len(prompts), subject), plain(pipe, [""] * len(prompts))
            for name, text in (("class noun", plain(pipe, prompts)), ("CAE in the prompt", with_cae(pipe, prompts, identity.kind))):
                for pathway, parts in PATHWAYS.items():
                    (states, pooled), (negative, negative_pooled) = heard(text, *parts), heard(empty, *parts)
                    images = pipe(
                        prompt_embeds=states, pooled_prompt_embeds=pooled, negative_prompt_embeds=negative, negative_pooled_prompt_embeds=negative_pooled,
                        guidance_scale=model.guidance_scale, fidelity_guidance_scale=0.0, num_inference_steps=model.steps, latents=noise, **model.call_options,
                    ).images  # fmt: skip
                    row = scores(oracle, images, identity, references, fields)
                    del row["accessory"]
                    collected.setdefault(f"{name}, {pathway}", []).append(row)
            pipe.unload_cae_embeddings("subject")
            print(f"{subject}:", ", ".join(f"{name} {rows[-1]['fidelity']:.2f}/{rows[-1]['editability']:.2f}" for name, rows in collected.items()), flush=True)
    print(table({name: {k: float(np.mean([row[k] for row in rows])) for k in rows[0]} for name, rows in collected.items()}))


if __name__ == "__main__":
    main()
