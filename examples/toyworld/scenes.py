"""The backdrops. Each painter fills a float32 canvas (h, w, 3), RGB in 0..1, and puts its own clutter on it."""

from __future__ import annotations

import cv2
import numpy as np


def _tint(rng: np.random.Generator, rgb, spread=0.04) -> tuple[float, float, float]:
    return tuple(float(c) for c in np.clip(np.asarray(rgb) + rng.uniform(-spread, spread, 3), 0, 1))


def _fill(canvas, rng, sky, ground, horizon=(0.45, 0.62)) -> int:
    """Sky above, ground below; returns the horizon's row."""
    row = int(rng.uniform(*horizon) * len(canvas))
    canvas[:row] = _tint(rng, sky)
    canvas[row:] = _tint(rng, ground)
    return row


def _spots(canvas, rng, count, radius, colour, top=0.0):
    h, w = canvas.shape[:2]
    for x, y in rng.uniform((0, top), (1, 1), (count, 2)):
        cv2.circle(canvas, (int(x * w), int(y * h)), max(1, int(radius * h)), colour, -1)


def _triangle(canvas, x, base, width, height, colour):
    h, w = canvas.shape[:2]
    points = [[(x - width) * w, base], [(x + width) * w, base], [x * w, base - height * h]]
    cv2.fillPoly(canvas, [np.array(points, np.int32)], colour)


def snow(canvas, rng):
    row = _fill(canvas, rng, (0.70, 0.80, 0.90), (0.93, 0.95, 0.98))
    for x in rng.uniform(0, 1, 2):
        _triangle(canvas, x, row, 0.10, 0.28, (0.35, 0.52, 0.50))
        _triangle(canvas, x, row - int(0.14 * len(canvas)), 0.07, 0.14, (0.95, 0.97, 1.0))
    _spots(canvas, rng, 10, 0.022, (1.0, 1.0, 1.0))


def beach(canvas, rng):
    h, w = canvas.shape[:2]
    row = _fill(canvas, rng, (0.55, 0.82, 0.97), (0.93, 0.84, 0.58), (0.52, 0.62))
    canvas[row - int(0.20 * h) : row] = _tint(rng, (0.10, 0.50, 0.75))
    canvas[row - int(0.03 * h) : row] = (0.92, 0.97, 0.98)
    cv2.circle(canvas, (int(rng.uniform(0.1, 0.9) * w), int(0.12 * h)), int(0.08 * h), (1.0, 0.92, 0.45), -1)
    _spots(canvas, rng, 4, 0.025, (0.80, 0.62, 0.40), top=0.70)


def forest(canvas, rng):
    h, w = canvas.shape[:2]
    _fill(canvas, rng, (0.16, 0.36, 0.20), (0.22, 0.26, 0.12), (0.72, 0.82))
    for x in (np.arange(4) + rng.uniform(0, 0.8, 4)) / 4:
        cv2.rectangle(canvas, (int(x * w), 0), (int((x + 0.07) * w), int(0.80 * h)), _tint(rng, (0.33, 0.21, 0.12)), -1)
    _spots(canvas[: int(0.28 * h)], rng, 9, 0.30, (0.10, 0.45, 0.16))


def city(canvas, rng):
    h, w = canvas.shape[:2]
    row = _fill(canvas, rng, (0.78, 0.76, 0.80), (0.36, 0.36, 0.38), (0.70, 0.80))
    for x in np.arange(4) / 4:
        top = int(rng.uniform(0.05, 0.40) * h)
        cv2.rectangle(canvas, (int(x * w), top), (int((x + 0.21) * w), row), _tint(rng, (0.50, 0.46, 0.48), 0.10), -1)
        for y in range(top + int(0.05 * h), row - int(0.08 * h), int(0.12 * h)):
            for dx in (0.03, 0.12):
                corner = (int((x + dx) * w), y)
                cv2.rectangle(canvas, corner, (corner[0] + int(0.06 * w), y + int(0.06 * h)), (0.96, 0.90, 0.60), -1)


def night(canvas, rng):
    h, w = canvas.shape[:2]
    _fill(canvas, rng, (0.05, 0.06, 0.20), (0.08, 0.11, 0.13), (0.70, 0.80))
    _spots(canvas[: int(0.65 * h)], rng, 12, 0.016, (0.95, 0.95, 0.80))
    cv2.circle(canvas, (int(rng.uniform(0.12, 0.88) * w), int(0.15 * h)), int(0.10 * h), (0.97, 0.96, 0.82), -1)


def desert(canvas, rng):
    h, w = canvas.shape[:2]
    row = _fill(canvas, rng, (0.98, 0.78, 0.52), (0.85, 0.52, 0.25), (0.55, 0.65))
    for x in rng.uniform(0, 1, 2):
        cv2.ellipse(canvas, (int(x * w), row), (int(0.40 * w), int(0.10 * h)), 0, 180, 360, _tint(rng, (0.78, 0.44, 0.20)), -1)
    x = int(rng.choice([rng.uniform(0.04, 0.2), rng.uniform(0.8, 0.96)]) * w)
    green = (0.20, 0.45, 0.22)
    cv2.rectangle(canvas, (x - int(0.03 * w), row - int(0.26 * h)), (x + int(0.03 * w), row + int(0.08 * h)), green, -1)
    cv2.rectangle(canvas, (x - int(0.10 * w), row - int(0.12 * h)), (x + int(0.10 * w), row - int(0.07 * h)), green, -1)
    cv2.rectangle(canvas, (x + int(0.06 * w), row - int(0.20 * h)), (x + int(0.10 * w), row - int(0.08 * h)), green, -1)


def rug(canvas, rng):
    h, w = canvas.shape[:2]
    row = _fill(canvas, rng, (0.86, 0.80, 0.68), (0.55, 0.38, 0.25), (0.40, 0.50))
    centre, deep = (w // 2, int(0.76 * h)), _tint(rng, (0.62, 0.12, 0.20))
    for scale, colour in ((1.0, deep), (0.80, (0.92, 0.78, 0.45)), (0.66, deep)):
        cv2.ellipse(canvas, centre, (int(0.50 * scale * w), int(0.22 * scale * h)), 0, 0, 360, colour, -1)
    x = int(rng.uniform(0.08, 0.65) * w)
    cv2.rectangle(canvas, (x, int(0.08 * h)), (x + int(0.25 * w), row - int(0.10 * h)), (0.45, 0.30, 0.20), -1)
    cv2.rectangle(canvas, (x + 4, int(0.08 * h) + 4), (x + int(0.25 * w) - 4, row - int(0.10 * h) - 4), _tint(rng, (0.6, 0.75, 0.75), 0.1), -1)


def grass(canvas, rng):
    h, w = canvas.shape[:2]
    _fill(canvas, rng, (0.62, 0.85, 0.98), (0.42, 0.74, 0.28), (0.40, 0.55))
    for x in rng.uniform(0, 1, 2):
        cv2.ellipse(canvas, (int(x * w), int(0.14 * h)), (int(0.16 * w), int(0.06 * h)), 0, 0, 360, (0.97, 0.98, 1.0), -1)
    _spots(canvas, rng, 5, 0.024, (0.96, 0.45, 0.60), top=0.62)
    _spots(canvas, rng, 5, 0.024, (0.98, 0.92, 0.40), top=0.62)


def water(canvas, rng):
    h, w = canvas.shape[:2]
    ramp = np.linspace(1.0, 0.0, h, dtype=np.float32)[:, None, None]
    canvas[:] = ramp * _tint(rng, (0.20, 0.68, 0.82)) + (1 - ramp) * np.float32(_tint(rng, (0.04, 0.28, 0.52)))
    for x in rng.uniform(0, 1, 3):
        cv2.rectangle(canvas, (int(x * w), int(rng.uniform(0.60, 0.80) * h)), (int((x + 0.04) * w), h), (0.08, 0.48, 0.32), -1)
    for x, y, r in rng.uniform((0, 0, 0.015), (1, 0.9, 0.05), (8, 3)):
        cv2.circle(canvas, (int(x * w), int(y * h)), max(1, int(r * h)), (0.70, 0.92, 0.97), 2)


def kitchen(canvas, rng):
    h, w = canvas.shape[:2]
    row = _fill(canvas, rng, (0.72, 0.86, 0.82), (0.90, 0.90, 0.88), (0.55, 0.65))
    step, dark = h // 8, _tint(rng, (0.35, 0.42, 0.48))
    for j, y in enumerate(range(row, h, step)):
        for x in range((j % 2) * step, w, 2 * step):
            cv2.rectangle(canvas, (x, y), (x + step - 1, y + step - 1), dark, -1)
    x = int(rng.uniform(0.0, 0.5) * w)
    cv2.rectangle(canvas, (x, int(0.06 * h)), (x + int(0.45 * w), int(0.24 * h)), _tint(rng, (0.66, 0.44, 0.26)), -1)
    cv2.circle(canvas, (x + int(0.22 * w), int(0.20 * h)), 2, (0.9, 0.85, 0.7), -1)


PAINTERS = {f.__name__: f for f in (snow, beach, forest, city, night, desert, rug, grass, water, kitchen)}
