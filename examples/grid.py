"""Pictures side by side, with captions, as one PNG."""

from __future__ import annotations

from typing import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LABEL = 16


def enlarged(image, side: int = 160) -> Image.Image:
    """Scaled to `side` pixels without smoothing, so that it shows what there is."""
    return Image.fromarray(np.asarray(image)).convert("RGB").resize((side, side), Image.Resampling.NEAREST)


def outlined(image, mask: np.ndarray, side: int = 160) -> Image.Image:
    """`image` enlarged, with the outline of `mask` (h, w) of 0 and 1 drawn on it."""
    canvas = np.array(enlarged(image, side))
    grown = cv2.resize(mask.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(grown, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, (255, 255, 255), 3)
    cv2.drawContours(canvas, contours, -1, (230, 0, 120), 1)
    return Image.fromarray(canvas)


def grid(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], labels: Sequence[str], side: int = 160) -> Image.Image:
    """Rows of pictures of `side` pixels under the names of their columns, each row under its label."""
    font = ImageFont.load_default(12)
    height = side + _LABEL + 4
    sheet = Image.new("RGB", (len(columns) * (side + 4), _LABEL + 4 + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for x, name in enumerate(columns):
        draw.text((x * (side + 4) + 4, 2), name, fill="black", font=font)
    for y, (row, label) in enumerate(zip(rows, labels)):
        top = _LABEL + 4 + y * height
        draw.text((4, top + 1), label, fill="dimgray", font=font)
        for x, image in enumerate(row):
            sheet.paste(image, (x * (side + 4), top + _LABEL))
    return sheet
