"""Pictures side by side, with captions, as one picture."""

from __future__ import annotations

from typing import Sequence

from PIL import Image, ImageDraw, ImageFont

LABEL_HEIGHT = 16


def picture_grid(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], labels: Sequence[str], side: int = 160) -> Image.Image:
    """Rows of pictures of `side` pixels under the names of their columns, each row under its label."""
    font = ImageFont.load_default(12)
    height = side + LABEL_HEIGHT + 4
    sheet = Image.new("RGB", (len(columns) * (side + 4), LABEL_HEIGHT + 4 + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for x, name in enumerate(columns):
        draw.text((x * (side + 4) + 4, 2), name, fill="black", font=font)
    for y, (row, label) in enumerate(zip(rows, labels)):
        top = LABEL_HEIGHT + 4 + y * height
        draw.text((4, top + 1), label, fill="dimgray", font=font)
        for x, image in enumerate(row):
            sheet.paste(image, (x * (side + 4), top + LABEL_HEIGHT))
    return sheet
