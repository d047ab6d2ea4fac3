"""Captions as people write prompts: the class nearly always, every other attribute about half of the time."""

from __future__ import annotations

import numpy as np

from toyworld.attributes import ACCESSORIES, PATTERNS, SCENES, Picture


def prompt(
    kind: str | None,
    scene: str | None = None,
    colour: str | None = None,
    pattern: str | None = None,
    second_colour: str | None = None,
    accessory: str | None = None,
    accessory_colour: str | None = None,
) -> str:
    """The caption that names exactly these attributes, e.g. ``a red dog with blue dots in the snow wearing a black hat``."""
    words = []
    if kind is not None:
        words += ["a", "plain" if pattern == "plain" else "", colour or ""]
        if second_colour is not None and pattern is None:
            words += ["and" if colour else "", second_colour]
        words += [kind]
        if pattern is not None and pattern != "plain":
            words += [PATTERNS[pattern].format(second_colour or "")]
    if scene is not None:
        words += [SCENES[scene]]
    if kind is not None and accessory is not None:
        words += [ACCESSORIES[accessory].format(accessory_colour or "")]
    words = " ".join(words).split()
    return " ".join("an" if w == "a" and after[:1] in "aeiou" else w for w, after in zip(words, words[1:] + ["."]))


def caption(picture: Picture, rng: np.random.Generator) -> str:
    """A caption of ``picture`` with varied detail; never empty."""
    scene = picture.scene if picture.subject is None or rng.random() < 0.7 else None
    if picture.subject is None or rng.random() < 0.04:
        return prompt(None, picture.scene)
    says = rng.random(5) < (0.5, 0.6, 0.8, 0.8, 0.7)
    says[2] ^= not says[1]  # whoever names the pattern mostly says its colour too, who does not mostly leaves both out
    patterned = picture.subject.pattern != "plain"
    return prompt(
        picture.subject.kind,
        scene,
        colour=picture.subject.colour.name if says[0] else None,
        pattern=picture.subject.pattern if says[1] else None,
        second_colour=picture.subject.second_colour.name if says[2] and patterned else None,
        accessory=picture.accessory if says[3] else None,
        accessory_colour=picture.accessory_colour.name if picture.accessory and says[4] else None,
    )
