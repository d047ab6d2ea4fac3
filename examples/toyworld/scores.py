"""Scores of generated pictures: what the oracle reads back of subject and scene, and the papers' CLIP-I, DINO and CLIP-T."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch

from toyworld.attributes import Subject
from toyworld.oracle import Oracle, stacked

COLOUR_DISTANCE = 0.2  # Euclidean, in RGB of 0..1, within which two colours count as the same; named ones are 0.39 or more apart
COLOUR_SHARE = 0.1  # of the subject's region that has to have a colour for it to count as read


def shows_colour(images: Sequence, region: torch.Tensor, rgb: Sequence[float]) -> torch.Tensor:
    """Whether the subject has this very colour, (n,) bool: near it are `COLOUR_SHARE` of the pixels in `region`.

    `region`: the oracle's logits (n, 16, 16). Calibrated on renderings: of subjects' own colours it finds 95 to 100 %, of
    colours of another name 5 to 7 %.
    """
    pixels = stacked(images)
    inside = torch.nn.functional.interpolate((region > 0).float()[:, None], pixels.shape[-2:])[:, 0] > 0
    near = (pixels - torch.tensor(rgb)[:, None, None]).norm(dim=1) <= COLOUR_DISTANCE
    return (near & inside).sum((1, 2)) >= COLOUR_SHARE * inside.sum((1, 2)).clamp_min(1)


def iou(masks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Intersection over union of bool masks (n, h, w): (n,); 0 where both are empty."""
    return (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2)).clamp_min(1)


@torch.no_grad()
def scores(oracle: Oracle, images: Sequence, subject: Subject, references: Sequence, captions: Sequence[dict[str, str]]) -> dict[str, float]:
    """Mean scores of `images` that should show `subject` as in `references`, where `captions` say (the attributes each names).

    class, colour, second colour, pattern: share of the pictures with the subject's own, read by the oracle or, the exact
    colours, by `shows_colour`. fidelity is their mean, editability the share in which it reads the caption's scene,
    overall the mean of the two. accessory: share of the captions that name one. clip_i, dino: cosine similarity to each
    reference, dino by the oracle's identity embedding; clip_t: to the caption.
    """
    made, real = oracle.read(images), oracle.read(references)
    result = {
        "class": np.mean([value == subject.kind for value in made.values("kind")]),
        "colour": shows_colour(images, made.region, subject.colour.rgb).float().mean(),
        "second colour": shows_colour(images, made.region, subject.second_colour.rgb).float().mean(),
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
    columns = list(dict.fromkeys(column for values in rows.values() for column in values))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | " + " | ".join("–" if np.isnan(v) else f"{v:.2f}" for v in (values.get(c, np.nan) for c in columns)) + " |" for name, values in rows.items()]
    return "\n".join(lines)
