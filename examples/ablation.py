"""The paper's ablation on a shipped model: the class noun, the CAE inside the prompt, DGM, and DGM with TCAM (DeGu).

python examples/ablation.py                       on the small Stable Diffusion; --family sdxl or sd3 for the others
python examples/ablation.py --tokens              DeGu with masks from each of the tokens instead
python examples/ablation.py --family sd3 --t5 none    SD 3 without its third text encoder, as people load it to save memory

Subjects that neither the model nor the sweep has seen, each in scenes that its references do not show. The oracle reads the
pictures back (`toyworld/scores.py` says how); the masks of the last step are compared with the oracle's idea of the subject's
region in the finished picture.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Iterator

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from learned import add_arguments, trained, work_folder
from quickstart import caption_text, compared
from shipped import SHIPPED, ShippedModel, starting_noise
from toyworld.oracle import Oracle
from toyworld.references import new_scenes, reference_pictures, rendered, subject_of
from toyworld.scores import iou, scores, table

COLUMNS = ("class noun", "CAE in the prompt", "DGM", "DGM + TCAM")
TOKENS = ("sot", "eot", "subject")


def components(model: ShippedModel, pipe, prompts: list[str], noun: str, seed: int) -> Iterator[tuple[str, list, torch.Tensor | None]]:
    """Name, pictures and last masks by what DeGu is made of."""
    made, masks = compared(model, pipe, prompts, noun, seed)
    yield from zip(COLUMNS, made, (None, None, None, masks))


def tokens(model: ShippedModel, pipe, prompts: list[str], noun: str, seed: int) -> Iterator[tuple[str, list, torch.Tensor | None]]:
    """Name, pictures and last masks by the token that masks are read from."""
    shared = dict(num_inference_steps=model.steps, latents=starting_noise(pipe, len(prompts), seed), **model.call_options)
    for token in TOKENS:
        pipe.enable_tcam(**model.tcam | {"token": token})
        output = pipe(prompts, guidance_scale=model.guidance_scale, **shared)
        yield f"[{token.upper()}]", output.images, output.subject_masks


def scored(ways, model: ShippedModel, pipe, oracle: Oracle, subject: int, scenes: int, seeds: int) -> dict[str, dict[str, float]]:
    """Scores by name of the way; `mask IoU` is the last masks' mean IoU with the oracle's region."""
    identity, references, fields = subject_of(subject), rendered(reference_pictures(subject)), new_scenes(subject, scenes) * seeds
    rows = {}
    for name, images, masks in ways(model, pipe, [caption_text(f) for f in fields], identity.kind, subject):
        row = scores(oracle, images, identity, references, fields)
        del row["accessory"]
        row["mask IoU"] = np.nan if masks is None else float(iou(masks > 0.5, oracle.read(images).region > 0).mean())
        rows[name] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(SHIPPED), default="sd", help="which of the small models")
    parser.add_argument("--tokens", action="store_true", help="compare the tokens that masks are read from")
    parser.add_argument("--t5", choices=("all", "prompt", "none"), default="all", help="SD 3: what T5 reads: prompt and CAE, the prompt alone, or nothing, since it is not loaded")
    add_arguments(parser)
    args = parser.parse_args()
    if args.t5 != "all" and args.family != "sd3":
        parser.error(f"--t5 {args.t5} is for --family sd3: the other families have no T5")
    diffusers_logging.set_verbosity_error()
    model, oracle = SHIPPED[args.family], Oracle.load()
    if args.t5 != "all":  # the CAE's terminal token is then CLIP's [EOT], which here looks at the subject, and not as well as the subject's own
        model = replace(model, tcam=model.tcam | {"token": "subject"})
    pipe = model.load(**({"text_encoder_3": None, "tokenizer_3": None} if args.t5 == "none" else {}))
    options = () if args.t5 == "all" else ("--without_t5",)
    collected: dict[str, list[dict[str, float]]] = {}
    with work_folder(args.work_dir) as folder:
        for subject in args.subjects:
            pipe.load_cae_embeddings(trained(model, subject, folder, args.train_steps, *options), adapter_name="subject")
            rows = scored(tokens if args.tokens else components, model, pipe, oracle, subject, args.scenes, args.seeds)
            pipe.unload_cae_embeddings("subject")
            identity = subject_of(subject)
            print(f"{subject} ({identity.colour.name} {identity.kind}, {identity.second_colour.name} {identity.pattern}):",
                  ", ".join(f"{name} {row['fidelity']:.2f}/{row['editability']:.2f}" for name, row in rows.items()),
                  f"mask IoU {row['mask IoU']:.2f}" if (row := rows.get(COLUMNS[-1])) else "", flush=True)  # fmt: skip
            for name, row in rows.items():
                collected.setdefault(name, []).append(row)
    print(table({name: {k: float(np.mean([row[k] for row in rows])) for k in rows[0]} for name, rows in collected.items()}))
    print(f"Subjects: {len(args.subjects)}; scenes: {args.scenes}; pictures of each: {args.seeds}")


if __name__ == "__main__":
    main()
