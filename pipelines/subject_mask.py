"""From attention maps to a subject mask (Test-time Cross-Attention Masking), batched and without leaving the device."""

from __future__ import annotations

import functools
from typing import Sequence

import torch
import torch.nn.functional as F

_BINS = 256
_FLT_EPSILON = 1.1920928955078125e-07  # below this share of pixels OpenCV's Otsu skips a class


def normalized(maps: torch.Tensor) -> torch.Tensor:
    """Scales each map (n, h, w) to 0..1; a constant map becomes 0."""
    low, high = torch.aminmax(maps.flatten(1), dim=1)
    span = (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    return (maps - low[:, None, None]) / span[:, None, None]


def _histograms(candidates: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Shares (candidates, n, 256) of integer bins 0..255, each candidate (n, pixels) of its own number of pixels."""
    first = candidates[0]
    shares = torch.zeros(len(candidates), len(first), _BINS, device=first.device, dtype=dtype)
    for share, bins in zip(shares, candidates):
        share.scatter_add_(1, bins, torch.ones((), device=bins.device, dtype=dtype).expand(bins.shape)).div_(bins.shape[1])
    return shares


def histogram_entropy(candidates: Sequence[torch.Tensor]) -> torch.Tensor:
    """Shannon entropies in nats, (candidates, n), of the 256-bin histogram over 0..1 of soft masks, each (n, h, w)."""
    bins = [(soft.flatten(1) * _BINS).long().clamp_(max=_BINS - 1) for soft in candidates]
    return torch.special.entr(_histograms(bins, torch.float32)).sum(2)


@functools.lru_cache(maxsize=64)
def _blur_matrix(size: int, kernel_size: int, sigma: float, device: torch.device) -> torch.Tensor:
    """The one-dimensional blur of `size` samples as a matrix (size, size), with OpenCV's default border: cb|abcd|cb."""
    offsets = torch.arange(kernel_size) - kernel_size // 2
    weights = torch.exp(-(offsets.double() ** 2) / (2 * sigma**2))
    period = max(2 * size - 2, 1)
    source = (torch.arange(size)[:, None] + offsets) % period  # of every sample and weight
    source = torch.minimum(source, period - source).clamp_(max=size - 1)
    matrix = torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, source, (weights / weights.sum()).expand(size, -1))
    return matrix.float().to(device)


def gaussian_blur(maps: torch.Tensor, kernel_size: int, sigma: float) -> torch.Tensor:
    """Blurs float32 maps (n, h, w) as `cv2.GaussianBlur` does, for any size down to 1x1."""
    if kernel_size == 1:
        return maps
    down, across = (_blur_matrix(size, kernel_size, sigma, maps.device) for size in maps.shape[1:])
    return down @ maps @ across.T


def otsu_threshold(candidates: Sequence[torch.Tensor]) -> torch.Tensor:
    """Otsu's thresholds (candidates, n) of integer levels 0..255, each candidate (n, pixels): `<=` against `>`.

    The between-class variance is maximised over all 256 levels, as OpenCV does; the lowest level wins a tie.
    """
    # Float64 as in OpenCV, where the device has it (MPS has not).
    device = candidates[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    share = _histograms(candidates, dtype)
    below = share.cumsum(2)  # class weight, OpenCV's q1
    moment = (share * torch.arange(_BINS, device=device, dtype=dtype)).cumsum(2)
    above = 1 - below
    variance = (moment[..., -1:] * below - moment).square() / (below * above)
    variance = variance.masked_fill(torch.minimum(below, above) < _FLT_EPSILON, 0)
    # Levels that no pixel has lie between the classes with equal variance up to rounding: take the first of them.
    return (variance >= variance.amax(2, keepdim=True) * (1 - 1e-12)).to(torch.uint8).argmax(2)


def quantized(soft_masks: torch.Tensor, kernel_size: int, sigma: float) -> torch.Tensor:
    """Blurs soft masks (n, h, w) in 0..1 in float32 and rounds them to integer levels 0..255, (n, h * w)."""
    return (gaussian_blur(soft_masks.float(), kernel_size, sigma) * 255).round_().clamp_(0, 255).long().flatten(1)


def subject_masks(
    maps: Sequence[torch.Tensor], size: tuple[int, int], *, invert: bool, kernel_size: int, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The subject masks of n images from one attention map per image and candidate resolution.

    Args:
        maps: candidates, coarsest first, each (n, h_i, w_i): attention to one token, averaged over heads and layers.
        size: (h, w) of the latent.
        invert: True for a token that looks at everything but the subject.

    Returns:
        Masks (n, h, w) of 0.0 and 1.0, and whether each image's map has a subject in it, (n,), bool: a constant map has
        none, and its mask is empty. Of the candidates each image takes the one with the lowest histogram entropy; a tie
        goes to the coarser.
    """
    soft = [normalized(candidate.float()) for candidate in maps]
    soft = [1 - s for s in soft] if invert else soft
    levels = [quantized(s, kernel_size, sigma) for s in soft]
    thresholds = otsu_threshold(levels)  # (candidates, n)
    masks, found = [], []
    for s, level, threshold in zip(soft, levels, thresholds):
        low, high = torch.aminmax(level, dim=1)
        found.append(high > low)
        mask = (level > threshold[:, None]) & found[-1][:, None]
        masks.append(F.interpolate(mask.view(len(s), 1, *s.shape[1:]).float(), size=size, mode="nearest")[:, 0])
    if len(maps) == 1:
        return masks[0], found[0]
    chosen = histogram_entropy(soft).argmin(0)  # the first, coarsest, of equals
    image = torch.arange(len(chosen), device=chosen.device)
    return torch.stack(masks)[chosen, image], torch.stack(found)[chosen, image]
