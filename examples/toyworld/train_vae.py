"""Trains the autoencoder: 64x64 pictures to 16x16 latents of eight channels.

python -m toyworld.train_vae --models_dir toyworld/models --work_dir work                     (from examples/)
python -m toyworld.train_vae --models_dir toyworld/models --work_dir work --decoder_only      afterwards: the latents stay
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import avg_pool2d

from toyworld.attributes import Picture
from toyworld.loop import fit
from toyworld.renderer import SIZE, render

KL_WEIGHT = 3e-3  # per latent number; keeps the latents' precision to what the picture needs


def pictures(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Fresh renderings as the VAE takes them: (count, 3, 64, 64) in -1..1."""
    images = np.stack([render(Picture.sample(rng))[0] for _ in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def error_of(difference: torch.Tensor) -> torch.Tensor:
    """Absolute error keeps edges sharp, squared error is what PSNR counts."""
    return 0.5 * difference.abs().mean() + 8 * difference.pow(2).mean()


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 72),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean PSNR in dB of the reconstructions of ``images`` (n, 3, h, w) in -1..1."""
    restored = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    return float((10 * torch.log10(4 / (restored - images).pow(2).mean((1, 2, 3)))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="where the checkpoint to resume from lies")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--full_size_steps", type=int, default=600, help="last steps on whole pictures instead of crops")
    parser.add_argument("--batch", type=int, default=16, help="per process, in 32x32 crops")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--decoder_only", action="store_true", help="refine the decoder of the autoencoder in --models_dir on whole pictures")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.decoder_only:
        vae = AutoencoderKL.from_pretrained(args.models_dir / "sd", subfolder="vae", dtype=torch.float32)
        vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)
        args.full_size_steps = args.steps
    else:
        vae = new_vae()
    vae.to(memory_format=torch.channels_last)
    module = torch.nn.ModuleDict({"vae": vae})
    checkpoint = args.work_dir / ("vae_decoder.pt" if args.decoder_only else "vae.pt")

    def loss_of(step: int, rng: np.random.Generator) -> torch.Tensor:
        if step < args.steps - args.full_size_steps:
            # Two crops a picture: the convolutions learn as much from them, for a quarter of the work.
            images = pictures(rng, args.batch // 2)
            x, y = rng.integers(0, SIZE // 2 + 1, 2)
            crops = [images[..., y : y + 32, x : x + 32], images[..., 32 - y : 64 - y, 32 - x : 64 - x]]
            images = torch.cat(crops)
        else:
            images = pictures(rng, args.batch // 4)
        images = images.to(vae.device, memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample()
        loss = error_of(vae.decode(latents).sample - images) + KL_WEIGHT * posterior.kl().mean() / latents[0].numel()
        # Half the latents' resolution gives the picture at half its size: latents with so little of their own in the high
        # frequencies are much easier to learn for a denoiser (Skorokhodov et al. 2025, scale equivariance).
        small = vae.decode(avg_pool2d(latents, 2)).sample - avg_pool2d(images, 2)
        return loss + 0.5 * error_of(small)

    if not fit(module, loss_of, checkpoint, args.steps, args.learning_rate, ema_decay=0.995):
        return
    images = pictures(np.random.default_rng(10**9), 256).to(vae.device)
    if not args.decoder_only:
        with torch.no_grad():
            vae.register_to_config(scaling_factor=round(1 / float(vae.encode(images).latent_dist.mode().std()), 5))
    print(f"PSNR {psnr(vae, images):.2f} dB")
    vae.half().save_pretrained(args.models_dir / "sd" / "vae")


if __name__ == "__main__":
    main()
