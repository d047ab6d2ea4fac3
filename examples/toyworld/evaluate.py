"""Prints how good the shipped models are: autoencoder, stock text-to-image pipeline, oracle.

python -m toyworld.evaluate [--family sd]       (from examples/)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from toyworld.attributes import CLASSES, COLOURS, PATTERNS, SCENES
from toyworld.captions import prompt
from toyworld.oracle import Oracle
from toyworld.text_encoders import MAX_LENGTH
from toyworld.train_oracle import accuracies
from toyworld.train_vae import pictures, psnr

MODELS = Path(__file__).parent / "models"


def read_back(pipe, oracle: Oracle, captions: list[dict[str, str]], guidance_scale: float, steps: int, seed: int, batch: int = 20) -> dict[str, float]:
    """Share of stock's pictures for `captions` in which the oracle reads what the caption names, by field."""
    hits: dict[str, list[bool]] = {}
    generator = torch.Generator().manual_seed(seed)
    options = {"max_sequence_length": MAX_LENGTH} if hasattr(pipe, "text_encoder_3") else {}  # of T5, as in training
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        prompts = [prompt(c["kind"], **{k: v for k, v in c.items() if k != "kind"}) for c in part]
        images = pipe(prompts, guidance_scale=guidance_scale, num_inference_steps=steps, generator=generator, **options).images
        reading = oracle.read(images)
        for i, fields in enumerate(part):
            for field, value in fields.items():
                hits.setdefault(field, []).append(reading.value(field, i) == value)
    return {field: float(np.mean(values)) for field, values in hits.items()}


def looks() -> list[dict[str, str]]:
    """Every class with every pattern, all colours named."""
    colours, made = list(COLOURS), []
    for i, kind in enumerate(CLASSES):
        for j, pattern in enumerate(PATTERNS):
            second = {} if pattern == "plain" else {"second_colour": colours[(i + j + 1) % len(colours)]}
            made.append({"kind": kind, "colour": colours[i], "pattern": pattern} | second)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd", "sdxl", "sd3"), default="sd")
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=2, help="pictures per class and scene, colour, and pattern")
    args = parser.parse_args()
    pipe, oracle = DiffusionPipeline.from_pretrained(MODELS / args.family), Oracle.load()
    pipe.set_progress_bar_config(disable=True)
    print(f"autoencoder: {psnr(pipe.vae, pictures(np.random.default_rng(10**9), 500)):.2f} dB PSNR on 500 fresh renderings")
    print("oracle on 2,000 fresh renderings:", {name: round(value, 3) for name, value in accuracies(oracle).items()})
    captions = {
        "class x scene": [{"kind": k, "scene": s} for k in CLASSES for s in SCENES],
        "class x colour": [{"kind": k, "colour": c} for k in CLASSES for c in COLOURS],
        "class x pattern, both colours named": looks(),
        "class x pattern, no colour named": [{"kind": k, "pattern": p} for k in CLASSES for p in PATTERNS],
    }
    for name, group in captions.items():
        found = read_back(pipe, oracle, group * args.repeats, args.guidance_scale, args.steps, seed=0)
        print(f"stock pipeline, {name} ({len(group) * args.repeats} pictures, guidance {args.guidance_scale:g}):", {k: round(v, 3) for k, v in found.items()})


if __name__ == "__main__":
    main()
