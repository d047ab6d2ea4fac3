"""Reference pictures of one subject, as a user would bring them: a few photos in one or two places."""

from __future__ import annotations

import numpy as np

from toyworld.attributes import SCENES, Picture, Subject
from toyworld.renderer import render


def subject_of(seed: int) -> Subject:
    """An identity that no training picture had: a pattern, so that there is something to recognise it by."""
    rng = np.random.default_rng((seed, 11))
    while (subject := Subject.sample(rng)).pattern == "plain":
        pass
    return subject


def reference_pictures(seed: int, count: int = 5, scenes: int = 2) -> list[Picture]:
    """`count` pictures of the subject in `scenes` scenes, large and without accessories."""
    rng = np.random.default_rng((seed, 12))
    places = [str(s) for s in rng.choice(list(SCENES), scenes, replace=False)]
    pictures = []
    for i in range(count):
        picture = Picture.sample(rng, subject=subject_of(seed), scene=places[i % scenes], accessorised=0.0)
        pictures.append(Picture(**{**vars(picture), "area": float(rng.uniform(0.28, 0.36))}))
    return pictures


def rendered(pictures: list[Picture]) -> list[np.ndarray]:
    return [render(p)[0] for p in pictures]


def new_scenes(seed: int, count: int) -> list[dict[str, str]]:
    """What captions name of the subject in the first `count` scenes that its references do not show: class and scene."""
    shown = {picture.scene for picture in reference_pictures(seed)}
    return [{"kind": subject_of(seed).kind, "scene": scene} for scene in SCENES if scene not in shown][:count]
