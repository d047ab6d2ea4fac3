"""The pictures' latents, encoded once: posterior mean and standard deviation, sampled afresh at every step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from degu.training.instance_images import InstanceImage, training_view


@dataclass(frozen=True)
class LatentCache:
    """Attributes:
    mean, std: of the VAE's posterior, unscaled, float32 (images * variants, channels, h, w); a picture's variants
        stand together.
    masks: (images * variants, 1, h, w) in 0..1, or None.
    sizes: (images * variants, 6), what `TrainingView.sizes` says.
    variants: views per picture.
    """

    mean: torch.Tensor
    std: torch.Tensor
    masks: torch.Tensor | None
    sizes: torch.Tensor
    variants: int

    @property
    def images(self) -> int:
        return len(self.mean) // self.variants


@torch.no_grad()
def cache_latents(
    vae, images: list[InstanceImage], resolution: int, center_crop: bool, random_flip: bool, variants: int, seed: int
) -> LatentCache:
    """Encodes `variants` views of each picture, one at a time."""
    means, stds, masks, sizes = [], [], [], []
    for index, image in enumerate(images):
        for variant in range(variants):
            rng = np.random.default_rng((seed, index, variant))
            view = training_view(image, resolution, center_crop, random_flip, rng)
            posterior = vae.encode(view.pixels[None].to(vae.device, vae.dtype)).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
            sizes.append(view.sizes)
            if view.mask is not None:
                masks.append(F.interpolate(view.mask[None], posterior.mean.shape[-2:], mode="area").to(vae.device))
    sizes = torch.tensor(sizes, dtype=torch.float32, device=vae.device)
    return LatentCache(torch.cat(means), torch.cat(stds), torch.cat(masks) if masks else None, sizes, variants)


@dataclass(frozen=True)
class Batch:
    """`latents`, `noise` (n, channels, h, w), `timesteps` (n,), `masks` (n, 1, h, w) or None, `sizes` (n, 6)."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    masks: torch.Tensor | None
    sizes: torch.Tensor


def draw_batch(cache: LatentCache, examples: range, num_train_timesteps: int, seed: int) -> Batch:
    """The training examples of these numbers.

    Example e of a run is a function of `seed` and e alone: so a resumed run sees what an uninterrupted one would, and
    several processes see together what one with their joint batch would. Pictures come in a new random order each epoch.
    """
    chosen, posterior_noise, noise, timesteps = [], [], [], []
    for example in examples:
        epoch, position = divmod(example, cache.images)
        picture = int(np.random.default_rng((seed, 1, epoch)).permutation(cache.images)[position])
        generator = torch.Generator().manual_seed(int(np.random.default_rng((seed, 2, example)).integers(2**63)))
        variant = int(torch.randint(cache.variants, (), generator=generator))
        chosen.append(picture * cache.variants + variant)
        timesteps.append(torch.randint(num_train_timesteps, (), generator=generator))
        drawn = torch.randn(2, *cache.mean.shape[1:], generator=generator)
        posterior_noise.append(drawn[0])
        noise.append(drawn[1])
    device = cache.mean.device
    mean, std = cache.mean[chosen], cache.std[chosen]
    return Batch(
        latents=mean + std * torch.stack(posterior_noise).to(device),
        noise=torch.stack(noise).to(device),
        timesteps=torch.stack(timesteps).to(device),
        masks=None if cache.masks is None else cache.masks[chosen],
        sizes=cache.sizes[chosen],
    )
