"""Trains the oracle on renderings and on their reconstructions by the autoencoder.

python -m toyworld.train_oracle --models_dir toyworld/models --work_dir work        (from examples/)
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
from toyworld.scores import iou, shows_colour

TEMPERATURE = 0.1


def pairs(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor, list[Picture]]:
    """Pictures (2 * count, 3, 64, 64) in -1..1, their masks (2 * count, 16, 16) in 0..1 and what they show.

    i and i + count show the same subject (or nobody) in two scenes.
    """
    subjects = [None if rng.random() < 0.04 else Subject.sample(rng) for _ in range(count)] * 2
    pictures = [Picture.sample(rng, subject=s, empty=0.0 if s else 1.0) for s in subjects]
    images, masks = (torch.from_numpy(np.stack(column)) for column in zip(*map(render, pictures)))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1, F.avg_pool2d(masks.float(), 4), pictures


def reading_loss(reading: Reading, masks: torch.Tensor, pictures: list[Picture]) -> torch.Tensor:
    """Cross-entropy of every field over the pictures that have it, and of the region."""
    loss, attributes = 0.0, [fields_of(p) for p in pictures]
    for name, values in FIELDS.items():
        target = torch.tensor([values.index(f[name]) if name in f else -1 for f in attributes], device=masks.device)
        if (target >= 0).any():
            loss = loss + F.cross_entropy(reading.logits[name], target, ignore_index=-1)
    return loss + F.binary_cross_entropy_with_logits(reading.region, masks)


def matching_loss(oracle: Oracle, reading: Reading, pictures: list[Picture], rng: np.random.Generator) -> torch.Tensor:
    """CLIP's symmetric loss between pictures and captions that name some of their attributes."""
    captions = []
    for fields in map(fields_of, pictures):
        kept = {name: value for name, value in fields.items() if rng.random() < 0.6}
        captions.append(kept or {"scene": fields["scene"]})
    logits = reading.clip @ oracle.embed_captions(captions).T / TEMPERATURE
    target = torch.arange(len(pictures), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def identity_loss(reading: Reading) -> torch.Tensor:
    """InfoNCE over the two halves: the other picture of the same subject is the match."""
    first, second = reading.identity.chunk(2)
    logits, target = first @ second.T / TEMPERATURE, torch.arange(len(first), device=first.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def halves_joined(first, second):
    """Batches of pairs, tensors or lists, as one: the first pictures of all pairs, then the second ones."""
    parts = [batch[half] for half in (0, 1) for batch in (_halves(first), _halves(second))]
    return torch.cat(parts) if isinstance(first, torch.Tensor) else sum(parts, [])


def _halves(batch):
    return batch[: len(batch) // 2], batch[len(batch) // 2 :]


@torch.no_grad()
def accuracies(oracle: Oracle, count: int = 2000, seed: int = 10**9) -> dict[str, float]:
    """How well fresh renderings are read: by field, the share read correctly of the pictures that have the field; of the exact
    colours, the share found by `shows_colour`; of the region, the mean IoU."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for _ in range(count // 100):
        pictures = [Picture.sample(rng) for _ in range(100)]
        images, masks = zip(*map(render, pictures))
        reading = oracle.read(images)
        for i, (picture, fields) in enumerate(zip(pictures, map(fields_of, pictures))):
            for name, value in fields.items():
                found.setdefault(name, []).append(reading.value(name, i) == value)
                if name in ("colour", "second_colour"):
                    shown = shows_colour(images[i : i + 1], reading.region[i : i + 1], getattr(picture.subject, name).rgb)
                    found.setdefault(f"exact {name}", []).append(bool(shown))
        truth = F.avg_pool2d(torch.from_numpy(np.stack(masks)).float(), 4) > 0.5
        overlap = iou(reading.region > 0, truth)
        found.setdefault("region, IoU", []).extend(overlap[truth.any(2).any(1)].tolist())
    return {name: float(np.mean(values)) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="where the checkpoint to resume from lies")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--pairs", type=int, default=24, help="subjects per step, two pictures each")
    parser.add_argument("--reconstructed", type=int, default=1500, help="subjects whose reconstructions are trained on")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    oracle = Oracle()
    vae = AutoencoderKL.from_pretrained(args.models_dir / "sd", subfolder="vae", dtype=torch.float32).eval()
    pool = []  # (reconstructions, masks, pictures) of 8 subjects each
    for i in range(args.reconstructed // 8):
        images, masks, pictures = pairs(np.random.default_rng((i, 3)), 8)
        with torch.no_grad():
            pool.append((vae(images).sample.clamp(-1, 1), masks, pictures))

    def loss_of(step: int, rng: np.random.Generator) -> torch.Tensor:
        fresh, restored = pairs(rng, args.pairs), pool[int(rng.integers(len(pool)))]
        images, masks, pictures = map(halves_joined, fresh, restored)
        images, masks = images.to(oracle.device), masks.to(oracle.device)
        with torch.autocast(images.device.type, torch.bfloat16):
            reading = oracle(images + 0.03 * torch.randn_like(images))
            loss = reading_loss(reading, masks, pictures)
            return loss + 0.3 * matching_loss(oracle, reading, pictures, rng) + 0.3 * identity_loss(reading)

    module = torch.nn.ModuleDict({"oracle": oracle})
    if fit(module, loss_of, args.work_dir / "oracle.pt", args.steps, 2e-3, weight_decay=0.05, ema_decay=0.995):
        oracle.cpu().save(args.models_dir / "oracle" / "oracle.safetensors")
        print({name: round(value, 4) for name, value in accuracies(oracle).items()})


if __name__ == "__main__":
    main()
