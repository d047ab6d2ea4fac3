"""Pictures made ready to be looked at."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image


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
