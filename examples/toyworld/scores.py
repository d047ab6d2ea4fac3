"""Scores of generated pictures, after the papers': CLIP-I, DINO, CLIP-T and their overall mean, read by the oracle."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from toyworld.oracle import Oracle


def scores(oracle: Oracle, images: Sequence, references: Sequence, captions: Sequence[dict[str, str]]) -> dict[str, float]:
    """Mean scores of `images`, which were made for `captions` (the attributes each prompt names).

    clip_i, dino: cosine similarity to each reference picture; dino is the oracle's identity embedding. clip_t: to the
    caption. class, scene, accessory: share of the pictures in which the oracle reads what the caption names.
    overall: the papers' (clip_i + dino) / 4 + clip_t / 2.
    """
    made, real = oracle.read(images), oracle.read(references)
    result = {
        "clip_i": float((made.clip @ real.clip.T).mean()),
        "dino": float((made.identity @ real.identity.T).mean()),
        "clip_t": float((made.clip * oracle.embed_captions(captions)).sum(1).mean()),
    }
    result["overall"] = (result["clip_i"] + result["dino"]) / 4 + result["clip_t"] / 2
    for field, name in (("kind", "class"), ("scene", "scene"), ("accessory", "accessory")):
        read = made.values(field)
        hits = [value == caption[field] for value, caption in zip(read, captions) if field in caption]
        result[name] = float(np.mean(hits)) if hits else float("nan")
    return result


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table with a row per name."""
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | " + " | ".join("–" if np.isnan(v) else f"{v:.3f}" for v in values.values()) + " |" for name, values in rows.items()]
    return "\n".join(lines)
