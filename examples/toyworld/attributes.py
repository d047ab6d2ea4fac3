"""What exists in the world: the names a caption can use, and the exact values that lie between those names."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace

import numpy as np

CLASSES = ("dog", "cat", "bird", "fish", "mug", "car", "boot", "robot")
SCENES = {  # name -> how a prompt says it
    "snow": "in the snow",
    "beach": "on the beach",
    "forest": "in the forest",
    "city": "in the city",
    "night": "at night",
    "desert": "in the desert",
    "rug": "on a rug",
    "grass": "on the grass",
    "water": "under water",
    "kitchen": "in the kitchen",
}
PATTERNS = {  # name -> how a prompt says it; {} is the second colour, or nothing
    "plain": "plain",
    "horizontal": "with horizontal {} stripes",
    "vertical": "with vertical {} stripes",
    "dots": "with {} dots",
    "twotone": "with a {} bottom",
    "emblem": "with a {} star",
}
ACCESSORIES = {"hat": "wearing a {} hat", "scarf": "wearing a {} scarf", "glasses": "wearing {} glasses"}
# Named colours as (hue, saturation, value), each in 0..1. Exact colours are spread around these.
COLOURS = {
    "red": (0.99, 0.85, 0.82),
    "orange": (0.075, 0.90, 0.96),
    "yellow": (0.155, 0.80, 0.97),
    "green": (0.36, 0.75, 0.62),
    "blue": (0.60, 0.80, 0.85),
    "purple": (0.77, 0.65, 0.66),
    "white": (0.12, 0.04, 0.96),
    "black": (0.66, 0.15, 0.13),
}
_COLOUR_SPREAD = np.array([0.022, 0.10, 0.07])  # half-widths of the uniform spread in hue, saturation, value


@dataclass(frozen=True)
class Colour:
    """A named colour and the exact one: ``rgb`` in 0..1."""

    name: str
    rgb: tuple[float, float, float]

    @classmethod
    def sample(cls, rng: np.random.Generator, exclude: tuple[str, ...] = ()) -> Colour:
        name = str(rng.choice([c for c in COLOURS if c not in exclude]))
        h, s, v = np.array(COLOURS[name]) + _COLOUR_SPREAD * rng.uniform(-1, 1, 3)
        rgb = colorsys.hsv_to_rgb(h % 1.0, np.clip(s, 0, 1), np.clip(v, 0.05, 1))
        return cls(name, tuple(float(c) for c in rgb))


@dataclass(frozen=True)
class Subject:
    """An identity: everything about a subject that stays the same from picture to picture.

    ``pattern_scale`` is the pattern's period and ``pattern_phase`` its offset, both in units of the subject's half-size.
    """

    kind: str
    colour: Colour
    second_colour: Colour
    pattern: str
    pattern_scale: float
    pattern_phase: tuple[float, float]

    @classmethod
    def sample(cls, rng: np.random.Generator, kind: str | None = None, pattern: str | None = None) -> Subject:
        colour = Colour.sample(rng)
        return cls(
            kind=kind or str(rng.choice(CLASSES)),
            colour=colour,
            second_colour=Colour.sample(rng, exclude=(colour.name,)),
            pattern=pattern or str(rng.choice(list(PATTERNS))),
            pattern_scale=float(rng.uniform(0.70, 1.00)),
            pattern_phase=tuple(float(p) for p in rng.uniform(0, 1, 2)),
        )


@dataclass(frozen=True)
class Picture:
    """One picture of the world. ``subject`` None: a scene with nobody in it.

    ``area`` is the share of the picture the subject covers, ``position`` its centre in -1..1 of the room that is left,
    ``mirrored`` whether it looks to the left; ``scene_seed`` fixes the clutter of the scene.
    """

    subject: Subject | None
    scene: str
    scene_seed: int
    area: float = 0.25
    position: tuple[float, float] = (0.0, 0.0)
    mirrored: bool = False
    accessory: str | None = None
    accessory_colour: Colour | None = None

    @classmethod
    def sample(
        cls,
        rng: np.random.Generator,
        subject: Subject | None = None,
        scene: str | None = None,
        empty: float = 0.05,
        accessorised: float = 0.35,
    ) -> Picture:
        """A random picture. ``empty``: chance of a scene without a subject, where none is given; ``accessorised``: of an
        accessory on the subject."""
        picture = cls(
            subject=subject or (None if rng.random() < empty else Subject.sample(rng)),
            scene=scene or str(rng.choice(list(SCENES))),
            scene_seed=int(rng.integers(2**31)),
            area=float(rng.uniform(0.22, 0.36)),
            position=tuple(float(p) for p in rng.uniform(-1, 1, 2)),
            mirrored=bool(rng.random() < 0.25),
        )
        if picture.subject is not None and rng.random() < accessorised:
            picture = replace(
                picture, accessory=str(rng.choice(list(ACCESSORIES))), accessory_colour=Colour.sample(rng)
            )
        return picture
