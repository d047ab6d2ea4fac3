"""The user's folder of pictures: which files count, and how they become training images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from degu.training.log import logger


@dataclass(frozen=True)
class InstanceImage:
    """One picture, upright, RGB, at its own size; `mask` (L, same size) is white on the subject, None where not given."""

    path: Path
    picture: Image.Image
    mask: Image.Image | None = None


def load_instance_images(folder: str | Path, mask_folder: str | Path | None = None) -> list[InstanceImage]:
    """Reads every picture in `folder`, sorted by name; skips hidden files, folders and files that are no pictures.

    EXIF orientation is applied; transparent pixels become white. Masks are found by the picture's file name, whatever the
    extension.

    Raises:
        ValueError: no such folder, no picture in it, or a mask missing or of another size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`--instance_data_dir` {folder} is not a folder.")
    images, skipped = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            skipped.append(path.name)
            continue
        try:
            with Image.open(path) as opened:
                picture = _flat_rgb(ImageOps.exif_transpose(opened))
        except (UnidentifiedImageError, OSError):
            skipped.append(path.name)
            continue
        mask = None if mask_folder is None else _mask_of(path, picture.size, Path(mask_folder))
        images.append(InstanceImage(path, picture, mask))
    if skipped:
        logger.warning(f"{folder}: skipped {len(skipped)} entries that are hidden, folders or not readable as pictures: {skipped[:5]}")
    if not images:
        raise ValueError(f"`--instance_data_dir` {folder} has no readable picture in it ({len(skipped)} other entries). Put 4 to 6 photos there.")
    return images


def _flat_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _mask_of(path: Path, size: tuple[int, int], folder: Path) -> Image.Image:
    found = sorted(p for p in folder.glob("*") if p.stem == path.stem and p.is_file())
    if len(found) != 1:
        raise ValueError(f"`--instance_mask_dir` {folder} has {len(found)} files named like {path.stem}; each picture needs exactly one mask.")
    with Image.open(found[0]) as opened:
        mask = ImageOps.exif_transpose(opened).convert("L")
    if mask.size != size:
        raise ValueError(f"The mask {found[0]} is {mask.size[0]}x{mask.size[1]}, its picture {size[0]}x{size[1]}.")
    return mask


@dataclass(frozen=True)
class TrainingView:
    """`pixels` (3, resolution, resolution) in -1..1; `mask` (1, resolution, resolution) in 0..1, or None; and `sizes`, in SDXL's
    order: height and width of the original, top and left of the crop, height and width of the view."""

    pixels: torch.Tensor
    mask: torch.Tensor | None
    sizes: tuple[int, int, int, int, int, int]


def training_view(image: InstanceImage, resolution: int, center_crop: bool, random_flip: bool, rng: np.random.Generator) -> TrainingView:
    """One square view: the shorter side scaled to `resolution`, then cropped, perhaps mirrored."""
    width, height = image.picture.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    room = (size[0] - resolution, size[1] - resolution)
    left, top = (room[0] // 2, room[1] // 2) if center_crop else (int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1)))
    mirrored = random_flip and rng.random() < 0.5

    def view(picture: Image.Image) -> torch.Tensor:
        picture = picture.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + resolution, top + resolution))
        pixels = np.array(ImageOps.mirror(picture) if mirrored else picture, np.float32)
        return torch.from_numpy(pixels.reshape(resolution, resolution, -1)).permute(2, 0, 1) / 255

    sizes = (height, width, top, room[0] - left if mirrored else left, resolution, resolution)
    return TrainingView(view(image.picture) * 2 - 1, None if image.mask is None else view(image.mask), sizes)


def is_augmented(images: list[InstanceImage], center_crop: bool, random_flip: bool) -> bool:
    """Whether a picture has more than one view."""
    return random_flip or (not center_crop and any(i.picture.width != i.picture.height for i in images))
