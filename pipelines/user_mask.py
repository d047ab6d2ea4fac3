"""Reading the mask a user brings along."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F


def latent_masks(mask, images: int, size: tuple[int, int]) -> torch.Tensor:
    """A user's subject mask as (images or 1, h, w) of 0.0 and 1.0 at latent `size`.

    Args:
        mask: a PIL picture, an array or tensor (h, w) or (n, h, w) or (n, 1, h, w), bool, 0..1 or 0..255 for uint8; or a list
            of those; one, or one per image. White or 1 is the subject.

    Raises:
        ValueError: another shape or number, or values outside the range.
    """
    if isinstance(mask, (list, tuple)):
        return torch.cat([latent_masks(one, 1, size) for one in _counted(mask, images)])
    if isinstance(mask, PIL.Image.Image):
        mask = np.array(mask.convert("L"))
    values = torch.as_tensor(mask)
    values = values.float() / 255 if values.dtype == torch.uint8 and values.numel() and values.max() > 1 else values.float()
    if values.ndim == 2:
        values = values[None]
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 3 or values.numel() == 0:
        raise ValueError(f"`subject_mask` has to be (h, w), (n, h, w) or (n, 1, h, w), but is {tuple(torch.as_tensor(mask).shape)}.")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"`subject_mask` has to be in 0..1 (or uint8), but spans {float(values.min())}..{float(values.max())}.")
    values = F.interpolate(_counted(values, images)[:, None], size=size, mode="nearest-exact")[:, 0]
    return (values > 0.5).float()


def _counted(masks, images: int):
    if len(masks) not in (1, images):
        raise ValueError(f"`subject_mask` holds {len(masks)} masks for {images} images: give one, or one per image.")
    return masks
