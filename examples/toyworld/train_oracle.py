"""Trains the oracle on renderings and on their reconstructions by the autoencoder.

python -m toyworld.train_oracle --output_dir models --work_dir work        (from examples/)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from toyworld.attributes import Picture, Subject
from toyworld.loop import fit
from toyworld.oracle import FIELDS, Oracle, Reading, fields_of
from toyworld.renderer import render

TEMPERATURE = 0.1


def pairs(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, list[Picture]]:
    """Pictures (2 * count, 3, 64, 64) in -1..1; i and i + count show the same subject (or nobody) in two scenes."""
    subjects = [None if rng.random() < 0.04 else Subject.sample(rng) for _ in range(count)] * 2
    pictures = [Picture.sample(rng, subject=s, empty=0.0 if s else 1.0) for s in subjects]
    images = np.stack([render(p)[0] for p in pictures])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, pictures


def reading_loss(reading: Reading, pictures: list[Picture]) -> torch.Tensor:
    """Cross-entropy of every field over the pictures that have it."""
    loss, attributes = 0.0, [fields_of(p) for p in pictures]
    for name, values in FIELDS.items():
        target = torch.tensor([values.index(f[name]) if name in f else -1 for f in attributes])
        if (target >= 0).any():
            loss = loss + F.cross_entropy(reading.logits[name], target, ignore_index=-1)
    return loss


def matching_loss(oracle: Oracle, reading: Reading, pictures: list[Picture], rng: np.random.Generator) -> torch.Tensor:
    """CLIP's symmetric loss between pictures and captions that name some of their attributes."""
    captions = []
    for fields in map(fields_of, pictures):
        kept = {name: value for name, value in fields.items() if rng.random() < 0.6}
        captions.append(kept or {"scene": fields["scene"]})
    logits = reading.clip @ oracle.embed_captions(captions).T / TEMPERATURE
    target = torch.arange(len(pictures))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def identity_loss(reading: Reading) -> torch.Tensor:
    """InfoNCE over the two halves: the other picture of the same subject is the match."""
    first, second = reading.identity.chunk(2)
    logits, target = first @ second.T / TEMPERATURE, torch.arange(len(first))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def accuracies(oracle: Oracle, count: int = 2000, seed: int = 10**9) -> dict[str, float]:
    """Share of fresh renderings read correctly, by field, over the pictures that have the field."""
    rng = np.random.default_rng(seed)
    hits: dict[str, list[bool]] = {name: [] for name in FIELDS}
    for _ in range(count // 100):
        pictures = [Picture.sample(rng) for _ in range(100)]
        reading = oracle.read([render(p)[0] for p in pictures])
        for name in FIELDS:
            for value, fields in zip(reading.values(name), map(fields_of, pictures)):
                if name in fields:
                    hits[name].append(value == fields[name])
    return {name: float(np.mean(values)) for name, values in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="where the checkpoint to resume from lies")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=24, help="subjects per step, two pictures each")
    parser.add_argument("--reconstructed", type=int, default=1500, help="subjects whose reconstructions are trained on")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    oracle = Oracle()
    vae = AutoencoderKL.from_pretrained(args.output_dir / "sd", subfolder="vae", torch_dtype=torch.float32).eval()
    pool = []  # (images, pictures) of 8 subjects each
    for i in range(args.reconstructed // 8):
        images, pictures = pairs(np.random.default_rng((i, 3)), 8)
        with torch.no_grad():
            pool.append((vae(images).sample.clamp(-1, 1), pictures))

    def loss_of(step: int, rng: np.random.Generator) -> torch.Tensor:
        images, pictures = pairs(rng, args.pairs)
        restored, originals = pool[int(rng.integers(len(pool)))]
        images = torch.cat([images.chunk(2)[0], restored.chunk(2)[0], images.chunk(2)[1], restored.chunk(2)[1]])
        half = len(pictures) // 2
        pictures = pictures[:half] + originals[:8] + pictures[half:] + originals[8:]
        reading = oracle(images + 0.03 * torch.randn_like(images))
        return reading_loss(reading, pictures) + 0.3 * matching_loss(oracle, reading, pictures, rng) + 0.3 * identity_loss(reading)

    module = torch.nn.ModuleDict({"oracle": oracle})
    if fit(module, loss_of, args.work_dir / "oracle.pt", args.steps, 2e-3, weight_decay=0.05, ema_decay=0.995):
        oracle.save(args.output_dir / "oracle" / "oracle.safetensors")
        print({name: round(value, 4) for name, value in accuracies(oracle).items()})


if __name__ == "__main__":
    main()
