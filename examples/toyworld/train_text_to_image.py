"""Trains a denoiser on latents of rendered pictures and their captions.

Needs the autoencoder and the text encoders that ``train_vae`` and ``train_text_encoder`` write to the same folder.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m toyworld.train_text_to_image --family sd --models_dir toyworld/models --work_dir work
(from examples/, with OMP_NUM_THREADS=1; add --stop_at N to end early and continue later with the same command)
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from toyworld.attributes import Picture
from toyworld.captions import caption
from toyworld.loop import fit
from toyworld.renderer import render
from toyworld.text_encoders import save_text_encoder
from toyworld.text_to_image import RECIPES

CAPTION_DROPOUT = 0.1
STEPS = {"sd": 25000, "sdxl": 2500, "sd3": 31000}


def picture(index: int, rank: int) -> Picture:
    return Picture.sample(np.random.default_rng((index, rank, 7)))


@torch.no_grad()
def cached_latents(vae: AutoencoderKL, file: Path, count: int, rank: int, batch: int = 20) -> torch.Tensor:
    """Scaled latents (count, 8, 16, 16) of this process's pictures; rendered and encoded once, then read from ``file``."""
    if not file.is_file():
        parts = []
        for start in range(0, count, batch):
            images = np.stack([render(picture(i, rank))[0] for i in range(start, min(count, start + batch))])
            images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.autocast(vae.device.type, torch.bfloat16):
                latents = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
            parts.append(latents.float() * vae.config.scaling_factor)
        temporary = file.with_suffix(".tmp")
        with open(temporary, "wb") as stream:
            np.save(stream, torch.cat(parts).numpy())
        os.replace(temporary, file)
    return torch.from_numpy(np.load(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(RECIPES), required=True)
    parser.add_argument("--models_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="where latents and the checkpoint to resume from lie")
    parser.add_argument("--pictures", type=int, default=12000, help="per process")
    parser.add_argument("--steps", type=int, default=None, help=f"by default {STEPS}")
    parser.add_argument("--stop_at", type=int, default=None)
    parser.add_argument("--batch", type=int, default=16, help="per process")
    parser.add_argument("--learning_rate", type=float, default=8e-4)
    parser.add_argument("--from_trained", action="store_true", help="start from the denoiser in --models_dir rather than from a new one")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser: minutes at the start, a quarter less time per step")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    # On a CPU, the backward pass of the fused attention is slow in bfloat16.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    torch.manual_seed(0)  # the same initial weights in every process
    accelerator = Accelerator()
    rank, device = accelerator.process_index, accelerator.device
    recipe = RECIPES[args.family](args.models_dir)
    latents = cached_latents(recipe.vae.to(memory_format=torch.channels_last), args.work_dir / f"latents{rank}.npy", args.pictures, rank)
    recipe.pipeline.to(device)
    if args.from_trained:
        recipe.denoiser.load_state_dict(type(recipe.denoiser).from_pretrained(args.models_dir / args.family / recipe.folder).state_dict())
    else:
        recipe.start([caption(picture(i, 0), np.random.default_rng(i)) for i in range(1000)])
    denoiser = torch.compile(recipe.denoiser) if args.compile else recipe.denoiser

    def loss_of(step: int, rng: np.random.Generator) -> torch.Tensor:
        chosen = rng.integers(0, len(latents), args.batch)
        captions = ["" if rng.random() < CAPTION_DROPOUT else caption(picture(i, rank), rng) for i in chosen]
        clean = latents[chosen].to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                texts = recipe.text_states(captions)
            return recipe.loss(denoiser, clean, texts)

    modules = torch.nn.ModuleDict({"denoiser": recipe.denoiser})
    checkpoint = args.work_dir / f"text_to_image_{args.family}.pt"
    if fit(modules, loss_of, checkpoint, args.steps or STEPS[args.family], args.learning_rate, warmup=200, ema_decay=0.998, stop_at=args.stop_at):
        folder = args.models_dir / args.family
        recipe.pipeline.to(torch.float16).save_pretrained(folder)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(recipe.pipeline, name, None) is not None:
                save_text_encoder(getattr(recipe.pipeline, name), folder / name)


if __name__ == "__main__":
    main()
