"""The mask's arithmetic, against OpenCV and SciPy."""

import cv2
import numpy as np
import pytest
import scipy.stats
import torch

from degu.pipelines import subject_mask as ours


def maps(seed: int, count: int = 8, shape=(16, 16)) -> np.ndarray:
    """Smooth blobs on noise, as attention looks; and the awkward ones: two levels, a ramp, one bright pixel, constants."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]] / max(shape)
    made = []
    for _ in range(count):
        cx, cy, r = rng.uniform(0.2, 0.8, 3)
        made.append(np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (0.1 * r)) * rng.uniform(0.1, 1) + 0.1 * rng.random(shape))
    made += [(x > 0.5) * 1.0, x + y, np.zeros(shape), np.full(shape, 0.3)]
    made[-3][shape[0] // 2, 0] = 5
    return np.stack(made).astype(np.float32)


def unit(a: np.ndarray) -> np.ndarray:
    span = a.max() - a.min()
    return (a - a.min()) / span if span > 0 else np.zeros_like(a)


@pytest.mark.parametrize("kernel_size, sigma", [(1, 1.0), (3, 0.5), (3, 1.0), (5, 1.5), (9, 2.0)])
@pytest.mark.parametrize("shape", [(16, 16), (7, 12), (3, 3), (1, 5)])
def test_blur_is_opencvs(kernel_size, sigma, shape):
    stack = maps(0, shape=shape)
    blurred = ours.gaussian_blur(torch.from_numpy(stack), kernel_size, sigma).numpy()
    expected = np.stack([cv2.GaussianBlur(a, (kernel_size, kernel_size), sigma) for a in stack])
    np.testing.assert_allclose(blurred, expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_otsu_splits_as_opencvs(seed):
    for levels in (np.round(np.stack([unit(a) for a in maps(seed)]) * 255).astype(np.uint8), np.random.default_rng(seed).integers(0, 256, (8, 9, 11)).astype(np.uint8)):
        thresholds = ours.otsu_threshold(ours.histograms(torch.from_numpy(levels.astype(np.int64)).flatten(1))[:, 0])[:, 0].tolist()
        assert [threshold < 255 for threshold in thresholds] == [image.min() < image.max() for image in levels]
        for image, threshold in zip(levels, thresholds):
            _, expected = cv2.threshold(image, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
            np.testing.assert_array_equal(image > threshold, expected.astype(bool) if image.min() < image.max() else False)


@pytest.mark.parametrize("seed", range(5))
def test_entropy_is_scipys(seed):
    soft = np.stack([unit(a) for a in maps(seed)])
    expected = [scipy.stats.entropy(np.histogram(a, bins=256, range=(0, 1))[0]) for a in soft]
    np.testing.assert_allclose(ours.entropy(ours.histograms(ours.entropy_bins(torch.from_numpy(soft)).flatten(1)), soft[0].size)[:, 0].numpy(), expected, atol=1e-5)


def reference(candidates: list[np.ndarray], size: tuple[int, int], invert: bool, kernel_size: int, sigma: float):
    """One image's mask in the words of the method: NumPy, SciPy, OpenCV."""
    best = None
    for a in candidates:
        soft = 1 - unit(a) if invert else unit(a)
        entropy = scipy.stats.entropy(np.histogram(soft, bins=256, range=(0, 1))[0])
        if best is None or entropy < best[0] - 1e-6:
            best = (entropy, soft)
    blurred = cv2.GaussianBlur(best[1].astype(np.float32), (kernel_size, kernel_size), sigma)
    levels = np.round(blurred * 255).astype(np.uint8)
    if levels.min() == levels.max():
        return np.zeros(size), False
    _, mask = cv2.threshold(levels, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST), True


@pytest.mark.parametrize("invert", [True, False])
@pytest.mark.parametrize("shapes, size", [([(16, 16)], (16, 16)), ([(8, 8), (16, 16)], (32, 32)), ([(6, 9), (12, 18)], (24, 36)), ([(7, 5), (13, 10)], (26, 19))])
def test_masks_are_the_references(shapes, size, invert):
    for seed in range(6):
        stacks = [maps(seed + 100 * i, shape=shape) for i, shape in enumerate(shapes)]
        masks, found = ours.subject_masks([torch.from_numpy(s) for s in stacks], size, invert=invert, kernel_size=3, sigma=1.0)
        assert masks.shape == (len(stacks[0]), *size)
        for i in range(len(masks)):
            expected, has_subject = reference([s[i] for s in stacks], size, invert, 3, 1.0)
            np.testing.assert_array_equal(masks[i].numpy(), expected)
            assert bool(found[i]) == has_subject


def test_a_mask_does_not_depend_on_the_rest_of_the_batch():
    stack = torch.from_numpy(maps(3))
    together, _ = ours.subject_masks([stack], (16, 16), invert=True, kernel_size=3, sigma=1.0)
    for i in range(len(stack)):
        alone, _ = ours.subject_masks([stack[i : i + 1]], (16, 16), invert=True, kernel_size=3, sigma=1.0)
        assert torch.equal(alone[0], together[i])
