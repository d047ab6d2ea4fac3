"""Scores of generated pictures: what the oracle reads back of subject and scene, and the papers' CLIP-I, DINO and CLIP-T."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch

from toyworld.attributes import Subject
from toyworld.oracle import Oracle

COLOUR_TOLERANCE = 0.2  # Euclidean distance in RGB, 0..1; named colours are at least twice as far apart


def is_near(found: torch.Tensor, wanted: Sequence[float]) -> bool:
    """Whether two colours count as the same."""
    return float((found - torch.tensor(wanted)).norm()) <= COLOUR_TOLERANCE


def iou(masks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Intersection over union of bool masks (n, h, w): (n,); 0 where both are empty."""
    return (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2)).clamp_min(1)


def scores(oracle: Oracle, images: Sequence, subject: Subject, references: Sequence, captions: Sequence[dict[str, str]]) -> dict[str, float]:
    """Mean scores of `images` that should show `subject` as in `references`, where `captions` say (the attributes each names).

    class, colour, second colour, pattern: share of the pictures in which the oracle reads the subject's own, the exact
    colours within `COLOUR_TOLERANCE`. fidelity is their mean, editability the share in which it reads the caption's scene,
    overall the mean of the two. accessory: share of the captions that name one. clip_i, dino: cosine similarity to each
    reference, dino by the oracle's identity embedding; clip_t: to the caption.
    """
    made, real = oracle.read(images), oracle.read(references)
    result = {
        "class": np.mean([value == subject.kind for value in made.values("kind")]),
        "colour": np.mean([is_near(rgb, subject.colour.rgb) for rgb in made.rgb["colour"]]),
        "second colour": np.mean([is_near(rgb, subject.second_colour.rgb) for rgb in made.rgb["second_colour"]]),
        "pattern": np.mean([value == subject.pattern for value in made.values("pattern")]),
    }
    result["fidelity"] = np.mean(list(result.values()))
    result["editability"] = np.mean([value == caption["scene"] for value, caption in zip(made.values("scene"), captions)])
    result["overall"] = (result["fidelity"] + result["editability"]) / 2
    worn = [value == caption["accessory"] for value, caption in zip(made.values("accessory"), captions) if "accessory" in caption]
    result["accessory"] = np.mean(worn) if worn else np.nan
    result["clip_i"] = (made.clip @ real.clip.T).mean()
    result["dino"] = (made.identity @ real.identity.T).mean()
    result["clip_t"] = (made.clip * oracle.embed_captions(captions)).sum(1).mean()
    return {name: float(value) for name, value in result.items()}


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table with a row per name."""
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | " + " | ".join("–" if np.isnan(v) else f"{v:.2f}" for v in values.values()) + " |" for name, values in rows.items()]
    return "\n".join(lines)
