"""Draws a :class:`~toyworld.attributes.Picture`: pixels and the exact subject mask."""

from __future__ import annotations

import cv2
import numpy as np

from toyworld.attributes import Picture, Subject
from toyworld.scenes import PAINTERS
from toyworld.silhouettes import ACCESSORY_PARTS, AREAS, SILHOUETTES, Part

SIZE = 64
_SUPERSAMPLING = 2
_FRACTION_BITS = 4  # sub-pixel positions handed to OpenCV, in 1/16 px
_STRIPE = 0.36  # of the period: the second colour is always the rarer one, so that a picture tells which is which


def _draw(canvas: np.ndarray, part: Part, place, colour) -> None:
    points = np.round(place(part.points) * (1 << _FRACTION_BITS)).astype(np.int32)
    cv2.fillPoly(canvas, [points], colour, shift=_FRACTION_BITS)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five-pointed star of radius 1: where the polar radius is below a five-lobed limit."""
    lobe = np.abs(((np.arctan2(u, -v) * 5 / (2 * np.pi)) % 1.0) * 2 - 1)  # 1 at a tip, 0 between two tips
    return np.hypot(u, v) < 0.45 + 0.55 * lobe


def pattern_mask(subject: Subject, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where the second colour goes, for local coordinates ``u``, ``v`` (same shape; the subject spans -1..1)."""
    period, (pu, pv) = subject.pattern_scale, subject.pattern_phase
    cell_u, cell_v = u / period + pu, v / period + pv
    if subject.pattern == "horizontal":
        return (cell_v % 1.0) < _STRIPE
    if subject.pattern == "vertical":
        return (cell_u % 1.0) < _STRIPE
    if subject.pattern == "dots":
        return (cell_u % 1.0 - 0.5) ** 2 + (cell_v % 1.0 - 0.5) ** 2 < 0.33**2
    if subject.pattern == "twotone":
        return v > 0.35 * (pv - 0.5) + 0.15
    if subject.pattern == "emblem":
        return _star((u + 0.1) / (period * 0.55), (v - 0.22) / (period * 0.55))
    return np.zeros(u.shape, bool)


def render(picture: Picture, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Returns the picture, uint8 RGB (size, size, 3), and the subject's mask without accessory, bool (size, size)."""
    side = size * _SUPERSAMPLING
    canvas = np.zeros((side, side, 3), np.float32)
    PAINTERS[picture.scene](canvas, np.random.default_rng(picture.scene_seed))
    mask = np.zeros((side, side), np.uint8)
    if picture.subject is not None:
        _draw_subject(canvas, mask, picture)
    canvas = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    mask = cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA)
    return np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8), mask > 127


def _draw_subject(canvas: np.ndarray, mask: np.ndarray, picture: Picture) -> None:
    subject, silhouette, side = picture.subject, SILHOUETTES[picture.subject.kind], len(canvas)
    half = side / 2 * min(0.98, np.sqrt(picture.area * 4 / AREAS[subject.kind]))  # half-size in pixels
    room = side / 2 - half
    cx, cy = side / 2 + picture.position[0] * room, side / 2 + picture.position[1] * room
    flip = -1.0 if picture.mirrored else 1.0

    def place(points):
        return points * np.float32((half * flip, half)) + np.float32((cx, cy))

    for part in silhouette.body:
        _draw(mask, part, place, 255)
    rows, columns = np.nonzero(mask)
    u, v = (columns - cx) / (half * flip), (rows - cy) / half
    second = pattern_mask(subject, u, v)[:, None]
    inner = cv2.erode(mask, np.ones((3, 3), np.uint8), borderValue=255)[rows, columns, None] > 0
    fill = np.where(second, np.float32(subject.second_colour.rgb), np.float32(subject.colour.rgb))
    canvas[rows, columns] = np.where(inner, fill, 0.45 * fill)  # a darker outline keeps the shape readable on any scene
    for part in silhouette.details:
        _draw(canvas, part, place, part.colour)
        _draw(mask, part, place, 255)
    if picture.accessory is not None:
        for part in ACCESSORY_PARTS[picture.accessory](silhouette):
            _draw(canvas, part, place, picture.accessory_colour.rgb)
