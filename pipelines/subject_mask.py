"""From attention maps to a subject mask (Test-time Cross-Attention Masking), batched and without leaving the device.

The maps are small, so that a step costs what its number of operations costs: candidates share operations where they can.
"""

from __future__ import annotations

import functools
from typing import Sequence

import torch
import torch.nn.functional as F

_BINS = 256


def normalized(maps: torch.Tensor) -> torch.Tensor:
    """Scales each map (n, h, w) to 0..1; a constant map becomes 0."""
    flat = maps.flatten(1)
    low, high = torch.aminmax(flat, dim=1, keepdim=True)
    return ((flat - low) / (high - low).clamp_min_(torch.finfo(maps.dtype).tiny)).view_as(maps)


def histograms(bins: torch.Tensor) -> torch.Tensor:
    """How often each of the integers 0..255 is in the last dimension of `bins`: (..., 256)."""
    # Float64, where the device has it (MPS has not), so that Otsu's sums are exact.
    dtype = torch.float32 if bins.device.type == "mps" else torch.float64
    counts = torch.zeros(*bins.shape[:-1], _BINS, device=bins.device, dtype=dtype)
    return counts.scatter_add_(-1, bins, counts.new_ones(()).expand(bins.shape))


def entropy(counts: torch.Tensor, total: int) -> torch.Tensor:
    """Shannon entropy in nats of each histogram (..., 256) of `total` values."""
    return torch.special.entr(counts / total).sum(-1)


def entropy_bins(soft_masks: torch.Tensor) -> torch.Tensor:
    """Soft masks (n, h, w) as indices 0..255 of equal bins over 0..1, (n, h * w)."""
    return (soft_masks * _BINS).long().clamp_(max=_BINS - 1).flatten(1)


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


def quantized(soft_masks: torch.Tensor, kernel_size: int, sigma: float) -> torch.Tensor:
    """Blurs float32 soft masks (n, h, w) in 0..1 and rounds them to the levels 0..255, (n, h, w), float32."""
    return (gaussian_blur(soft_masks, kernel_size, sigma) * 255).round_()


def otsu_threshold(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Otsu's threshold of each histogram (..., 256) of levels, `<=` against `>`, and whether there are two levels at all.

    The between-class variance is maximised over all 256 levels, as OpenCV does; the lowest level wins a tie. It is taken
    from sums of whole numbers: levels that no pixel has tie exactly with the one below, and an empty class has exactly 0.

    Returns:
        (...,) int64 and (...,) bool
    """
    below = counts.cumsum(-1)  # OpenCV's q1, times the number of pixels
    moment = (counts * torch.arange(_BINS, device=counts.device, dtype=counts.dtype)).cumsum(-1)
    pixels, total = below[..., -1:], moment[..., -1:]
    variance = (total * below - pixels * moment).square_() / (below * (pixels - below)).clamp_min_(1)
    highest, threshold = variance.max(-1)
    return threshold, highest > 0


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
    bins = [level.flatten(1).long() for level in levels]
    # Nearest neighbours commute with the threshold, so all candidates can be brought to one size before it.
    resized = torch.cat([F.interpolate(level[None], size=size, mode="nearest") for level in levels])  # (candidates, n, h, w)
    if len(maps) == 1:
        level, counts = resized[0], histograms(bins[0])
    else:
        pairs = [histograms(torch.stack([of_otsu, entropy_bins(s)])) for of_otsu, s in zip(bins, soft)]
        entropies = torch.stack([entropy(pair[1], of_otsu.shape[1]) for pair, of_otsu in zip(pairs, bins)])
        chosen = entropies.argmin(0)  # the first, coarsest, of equals
        image = torch.arange(len(chosen), device=chosen.device)
        level, counts = resized[chosen, image], torch.stack([pair[0] for pair in pairs])[chosen, image]
    threshold, found = otsu_threshold(counts)
    return ((level > threshold[:, None, None]) & found[:, None, None]).float(), found
