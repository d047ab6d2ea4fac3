"""The shape of every class in local coordinates: x to the right, y down, within -1..1, looking to the right.

A silhouette is the union of its ``body`` parts, which carry the subject's colours and pattern; ``details`` are drawn on top
in a fixed colour. The anchors say where accessories go.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

_DARK, _LIGHT, _BEAK = (0.10, 0.10, 0.12), (0.92, 0.93, 0.95), (0.95, 0.65, 0.15)


@dataclass(frozen=True)
class Part:
    """A filled polygon, ``points`` of shape (n, 2); ``colour`` None for body parts."""

    points: np.ndarray
    colour: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Silhouette:
    body: tuple[Part, ...]
    details: tuple[Part, ...]
    head: tuple[float, float, float]  # centre x, centre y, half-width: where glasses sit, and above it the hat
    neck: tuple[float, float, float]  # centre x, centre y, half-width: where a scarf goes


def _polygon(*points, colour=None) -> Part:
    return Part(np.array(points, np.float32), colour)


def _box(x0, y0, x1, y1, colour=None) -> Part:
    return _polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1), colour=colour)


def _oval(cx, cy, rx, ry, angle=0.0, colour=None) -> Part:
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    a = np.deg2rad(angle)
    x, y = rx * np.cos(t), ry * np.sin(t)
    points = np.stack([cx + x * np.cos(a) - y * np.sin(a), cy + x * np.sin(a) + y * np.cos(a)], 1)
    return Part(points.astype(np.float32), colour)


def _eye(cx, cy, r=0.075) -> tuple[Part, ...]:
    return (_oval(cx, cy, r * 1.5, r * 1.5, colour=_LIGHT), _oval(cx + 0.03, cy, r, r, colour=_DARK))


SILHOUETTES = {
    "dog": Silhouette(
        body=(
            _oval(-0.15, 0.10, 0.70, 0.40),
            _box(-0.78, 0.10, -0.48, 0.95), _box(0.15, 0.10, 0.45, 0.95),
            _oval(0.52, -0.38, 0.40, 0.38), _oval(0.80, -0.26, 0.24, 0.17),
            _polygon((-0.75, 0.05), (-1.0, -0.55), (-0.80, -0.60), (-0.50, -0.10)),
        ),
        details=(_oval(0.28, -0.34, 0.14, 0.34, 12, colour=(0.25, 0.16, 0.10)), *_eye(0.60, -0.46), _oval(1.0, -0.30, 0.08, 0.07, colour=_DARK)),
        head=(0.55, -0.44, 0.40), neck=(0.40, -0.04, 0.36),
    ),
    "cat": Silhouette(
        body=(
            _oval(-0.05, 0.42, 0.50, 0.56), _oval(0.12, -0.38, 0.46, 0.40),
            _polygon((-0.32, -0.40), (-0.30, -1.0), (0.06, -0.66)), _polygon((0.18, -0.66), (0.52, -1.0), (0.56, -0.40)),
            _polygon((-0.40, 0.90), (-0.95, 0.70), (-0.98, 0.05), (-0.78, 0.05), (-0.70, 0.50), (-0.35, 0.62)),
        ),
        details=(*_eye(-0.06, -0.42), *_eye(0.30, -0.42), _polygon((0.06, -0.24), (0.18, -0.24), (0.12, -0.14), colour=(0.9, 0.45, 0.5))),
        head=(0.12, -0.46, 0.44), neck=(0.10, 0.02, 0.38),
    ),
    "bird": Silhouette(
        body=(
            _oval(-0.05, 0.12, 0.66, 0.50, -12), _oval(0.50, -0.42, 0.36, 0.36),
            _polygon((-0.50, 0.00), (-1.0, -0.15), (-0.98, 0.35), (-0.50, 0.40)),
        ),
        details=(
            _polygon((0.80, -0.54), (1.04, -0.38), (0.80, -0.26), colour=_BEAK), *_eye(0.56, -0.48),
            _polygon((-0.45, -0.05), (0.25, -0.05), (-0.10, 0.38), (-0.55, 0.42), colour=(0.33, 0.33, 0.38)),
            _box(-0.12, 0.58, -0.04, 0.95, colour=_BEAK), _box(0.14, 0.56, 0.22, 0.95, colour=_BEAK),
        ),
        head=(0.50, -0.50, 0.36), neck=(0.36, -0.12, 0.36),
    ),
    "fish": Silhouette(
        body=(
            _oval(0.18, 0.0, 0.78, 0.52), _polygon((-0.42, 0.0), (-1.0, -0.60), (-0.84, 0.0), (-1.0, 0.60)),
            _polygon((-0.10, -0.40), (0.05, -0.85), (0.45, -0.42)), _polygon((-0.05, 0.42), (0.05, 0.80), (0.35, 0.44)),
        ),
        details=(*_eye(0.62, -0.14, 0.09), _polygon((0.78, 0.16), (0.94, 0.12), (0.80, 0.24), colour=_DARK)),
        head=(0.58, -0.14, 0.36), neck=(0.30, 0.28, 0.50),
    ),
    "mug": Silhouette(
        body=(
            _polygon((-0.72, -0.80), (0.50, -0.80), (0.44, 0.85), (-0.66, 0.85)),
            _polygon((0.48, -0.50), (0.80, -0.50), (0.98, -0.30), (0.98, 0.25), (0.80, 0.50), (0.45, 0.50),
                     (0.45, 0.28), (0.68, 0.28), (0.76, 0.15), (0.76, -0.20), (0.68, -0.30), (0.48, -0.30)),
        ),
        details=(_oval(-0.11, -0.80, 0.61, 0.13, colour=(0.35, 0.22, 0.14)),),
        head=(-0.11, -0.42, 0.52), neck=(-0.11, 0.20, 0.58),
    ),
    "car": Silhouette(
        body=(
            _polygon((-1.0, 0.0), (-0.62, -0.08), (-0.38, -0.60), (0.40, -0.60), (0.66, -0.06), (1.0, 0.04), (1.0, 0.48), (-1.0, 0.48)),
        ),
        details=(
            _oval(-0.55, 0.48, 0.25, 0.25, colour=_DARK), _oval(0.55, 0.48, 0.25, 0.25, colour=_DARK),
            _oval(-0.55, 0.48, 0.10, 0.10, colour=_LIGHT), _oval(0.55, 0.48, 0.10, 0.10, colour=_LIGHT),
            _polygon((-0.44, -0.10), (-0.28, -0.48), (-0.04, -0.48), (-0.04, -0.10), colour=(0.72, 0.87, 0.95)),
            _polygon((0.06, -0.10), (0.06, -0.48), (0.32, -0.48), (0.48, -0.10), colour=(0.72, 0.87, 0.95)),
        ),
        head=(0.05, -0.28, 0.42), neck=(0.0, 0.18, 0.80),
    ),
    "boot": Silhouette(
        body=(
            _polygon((-0.70, -0.95), (0.10, -0.95), (0.12, 0.05), (0.62, 0.22), (0.95, 0.48), (0.98, 0.76), (-0.72, 0.76)),
        ),
        details=(
            _polygon((-0.74, 0.74), (1.0, 0.74), (1.0, 0.95), (0.0, 0.95), (-0.15, 0.84), (-0.30, 0.95), (-0.74, 0.95), colour=(0.30, 0.19, 0.12)),
            _box(-0.76, -0.98, 0.16, -0.80, colour=(0.75, 0.68, 0.58)),
        ),
        head=(-0.30, -0.56, 0.40), neck=(-0.30, -0.12, 0.42),
    ),
    "robot": Silhouette(
        body=(
            _box(-0.52, -0.22, 0.52, 0.58), _box(-0.42, -0.86, 0.42, -0.26),
            _box(-0.86, -0.18, -0.58, 0.42), _box(0.58, -0.18, 0.86, 0.42),
            _box(-0.44, 0.58, -0.10, 0.96), _box(0.10, 0.58, 0.44, 0.96), _box(-0.60, -0.16, 0.60, 0.04),
        ),
        details=(_box(-0.28, -0.70, -0.06, -0.46, colour=_LIGHT), _box(0.06, -0.70, 0.28, -0.46, colour=_LIGHT),
                 _box(-0.20, -0.64, -0.10, -0.52, colour=_DARK), _box(0.14, -0.64, 0.24, -0.52, colour=_DARK),
                 _box(-0.04, -1.0, 0.04, -0.86, colour=(0.45, 0.45, 0.5)), _box(-0.22, -0.40, 0.22, -0.33, colour=_DARK)),
        head=(0.0, -0.58, 0.42), neck=(0.0, -0.20, 0.46),
    ),
}  # fmt: skip


def hat(s: Silhouette) -> tuple[Part, ...]:
    x, y, w = s.head
    top = y - 0.62 * w
    return (
        _box(x - 1.15 * w, top - 0.20, x + 1.15 * w, top),
        _polygon((x - 0.75 * w, top - 0.15), (x - 0.62 * w, top - 0.62), (x + 0.62 * w, top - 0.62), (x + 0.75 * w, top - 0.15)),
    )


def scarf(s: Silhouette) -> tuple[Part, ...]:
    x, y, w = s.neck
    return (_box(x - w * 1.05, y - 0.13, x + w * 1.05, y + 0.13), _box(x - w * 0.9, y, x - w * 0.9 + 0.26, y + 0.55))


def glasses(s: Silhouette) -> tuple[Part, ...]:
    x, y, w = s.head
    return (
        _oval(x - 0.48 * w, y, 0.21, 0.21), _oval(x + 0.58 * w, y, 0.21, 0.21), _box(x - 1.0 * w, y - 0.06, x + 1.0 * w, y + 0.06),
    )  # fmt: skip


ACCESSORY_PARTS = {"hat": hat, "scarf": scarf, "glasses": glasses}


def _area(s: Silhouette) -> float:
    """Area in local units (the whole -1..1 square is 4)."""
    mask = np.zeros((200, 200), np.uint8)
    for part in s.body + s.details:
        cv2.fillPoly(mask, [np.round((part.points + 1) * 100).astype(np.int32)], 1)
    return float(mask.mean() * 4)


AREAS = {name: _area(s) for name, s in SILHOUETTES.items()}
