"""From attention maps to a subject mask (Test-time Cross-Attention Masking), batched and without leaving the device.

The maps are small, so that a step costs what its number of operations costs, above all of different ones, each of which is new to the
processor's caches: candidates share operations where they can.
"""

from __future__ import annotations

import functools
from typing import Sequence

import torch
import torch.nn.functional as F

_BINS = 256


def soft_masks(maps: torch.Tensor, invert: bool) -> torch.Tensor:
    """Each map (n, h, w) scaled to 0..1, A = (maps - min) / (max - min), or 1 - A; a constant map becomes 0."""
    flat = maps.flatten(1)
    low, high = torch.aminmax(flat, dim=1, keepdim=True)
    above = high - flat if invert else flat - low
    return (above / (high - low).clamp_min_(torch.finfo(maps.dtype).tiny)).view_as(maps)


@functools.lru_cache(maxsize=8)
def _one(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones((), device=device, dtype=dtype)


def histograms(bins: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """How often each of the integers 0..255 is in the last dimension of `bins` (n, values): (n, groups, 256).

    Values of the group i, counted from 0, are larger by 256 i.
    """
    # Float64, where the device has it (MPS has not), so that Otsu's sums are exact.
    dtype = torch.float32 if bins.device.type == "mps" else torch.float64
    counts = torch.zeros(len(bins), groups * _BINS, device=bins.device, dtype=dtype)
    return counts.scatter_add_(1, bins, _one(bins.device, dtype).expand(bins.shape)).view(-1, groups, _BINS)


def entropy(counts: torch.Tensor, totals: torch.Tensor | int) -> torch.Tensor:
    """Shannon entropy in nats of each histogram (..., 256) of so many values: (...)."""
    return torch.special.entr(counts / totals).sum(-1)


def entropy_bins(soft_masks: torch.Tensor) -> torch.Tensor:
    """Soft masks as indices 0..255 of equal bins over 0..1."""
    return (soft_masks * _BINS).long().clamp_(max=_BINS - 1)


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
    return down @ maps @ across.mT


@functools.lru_cache(maxsize=64)
def _layout(sizes: tuple[tuple[int, int], ...], size: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of maps of these sizes, flattened one after another into (pixels,):

    256 times the number of the map that each pixel is in, (pixels,); how many pixels each map has, (maps, 1); and for each map, which
    pixels make it a picture of `size`, nearest neighbour, (maps, h * w).
    """
    counts = [height * width for height, width in sizes]
    numbers = torch.arange(sum(counts), dtype=torch.float32)
    scaled = [F.interpolate(part.view(1, 1, *shape), size=size, mode="nearest") for part, shape in zip(numbers.split(counts), sizes)]
    groups = torch.cat([torch.full((count,), number * _BINS) for number, count in enumerate(counts)])
    return groups.to(device), torch.tensor(counts, device=device)[:, None], torch.stack(scaled).flatten(1).long().to(device)


@functools.lru_cache(maxsize=8)
def _ramp(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels 0..255; and what makes 255 win where no split has any variance, but not against one that has."""
    levels = torch.arange(_BINS, device=device, dtype=dtype)
    return levels, (levels == _BINS - 1).to(dtype) * torch.finfo(dtype).tiny


def otsu_threshold(counts: torch.Tensor) -> torch.Tensor:
    """Otsu's threshold of each histogram (..., 256) of levels, `<=` against `>`; 255 where there is only one level: (..., 1), int64.

    The between-class variance is maximised over all 256 levels, as OpenCV does; the lowest level wins a tie. It is taken
    from sums of whole numbers: levels that no pixel has tie exactly with the one below, and an empty class has exactly 0.
    """
    ramp, nothing_above = _ramp(counts.device, counts.dtype)
    below = counts.cumsum(-1)  # OpenCV's q1, times the number of pixels
    moment = (counts * ramp).cumsum(-1)
    pixels, total = below[..., -1:], moment[..., -1:]
    difference = total * below - pixels * moment
    variance = difference * difference / (below * (pixels - below)).clamp_min_(1)
    return (variance + nothing_above).argmax(-1, keepdim=True)  # the first of equals


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
    soft = [soft_masks(candidate.float(), invert) for candidate in maps]
    blurred = [gaussian_blur(s, kernel_size, sigma) for s in soft]
    # From here on all candidates at once, their pixels one after another.
    groups, pixels, nearest = _layout(tuple(tuple(s.shape[1:]) for s in soft), tuple(size), soft[0].device)
    levels = (torch.cat([b.flatten(1) for b in blurred], 1) * 255).round_()  # (n, pixels), float32
    bins = levels.long() + groups
    if len(maps) == 1:
        counts, nearest = histograms(bins)[:, 0], nearest.expand(len(levels), -1)
    else:
        entropy_of = entropy_bins(torch.cat([s.flatten(1) for s in soft], 1)) + groups
        both = histograms(torch.cat([bins, entropy_of + len(maps) * _BINS], 1), 2 * len(maps))
        chosen = entropy(both[:, len(maps) :], pixels).argmin(1).view(-1, 1, 1)  # the first, coarsest, of equals
        counts, nearest = (of.gather(1, chosen.expand(-1, 1, of.shape[2])).squeeze(1) for of in (both, nearest.expand(len(chosen), -1, -1)))
    threshold = otsu_threshold(counts)
    # Nearest neighbours commute with the threshold.
    masks = levels.gather(1, nearest) > threshold
    return masks.float().view(-1, *size), threshold.squeeze(1) < _BINS - 1
