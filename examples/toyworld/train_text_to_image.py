"""Trains the denoiser on latents of rendered pictures and their captions.

Needs the autoencoder and the text encoder that ``train_vae`` and ``train_text_encoder`` write to the same folder.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m toyworld.train_text_to_image --output_dir models/sd --work_dir work
(from examples/, with OMP_NUM_THREADS=1; add --stop_at N to end early and continue later with the same command)
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toyworld.attributes import Picture
from toyworld.captions import caption
from toyworld.loop import fit
from toyworld.renderer import SIZE, render

CAPTION_DROPOUT = 0.1


def new_unet() -> UNet2DConditionModel:
    """Cross-attention at 16x16, 8x8 and 4x4; the decoder's, which carry the masks, at 16x16 and 8x8."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(2, 4, 5),  # the number of heads, of 32 channels each: diffusers' old name for it
        norm_num_groups=16,
        use_linear_projection=True,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


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
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="where latents and the checkpoint to resume from lie")
    parser.add_argument("--pictures", type=int, default=12000, help="per process")
    parser.add_argument("--steps", type=int, default=25000)
    parser.add_argument("--stop_at", type=int, default=None)
    parser.add_argument("--batch", type=int, default=16, help="per process")
    parser.add_argument("--learning_rate", type=float, default=8e-4)
    parser.add_argument("--compile", action="store_true", help="compile the denoiser: minutes at the start, a quarter less time per step")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)  # the same initial weights in every process
    accelerator = Accelerator()
    rank, device = accelerator.process_index, accelerator.device
    vae = AutoencoderKL.from_pretrained(args.output_dir, subfolder="vae", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.output_dir, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(args.output_dir, subfolder="text_encoder").float().eval().requires_grad_(False).to(device)
    unet, scheduler = new_unet().to(memory_format=torch.channels_last), new_scheduler()
    unet.set_attn_processor(AttnProcessor())  # on a CPU, the backward pass of the fused attention is slow in bfloat16
    denoiser = torch.compile(unet) if args.compile else unet
    latents = cached_latents(vae.to(memory_format=torch.channels_last), args.work_dir / f"latents{rank}.npy", args.pictures, rank)
    steps_of = scheduler.config.num_train_timesteps

    def loss_of(step: int, rng: np.random.Generator) -> torch.Tensor:
        chosen = rng.integers(0, len(latents), args.batch)
        captions = ["" if rng.random() < CAPTION_DROPOUT else caption(picture(i, rank), rng) for i in chosen]
        tokens = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
        clean = latents[chosen].to(device, memory_format=torch.channels_last)
        noise = torch.randn_like(clean)
        # Stratified, for less variance; three in four from the middle, where shapes and patterns are decided.
        t = (torch.randperm(args.batch) + torch.rand(args.batch)) / args.batch
        t = torch.where(torch.arange(args.batch) % 4 == 0, t, 0.10 + 0.68 * t)
        t = (t * steps_of).long().to(device)
        target = scheduler.get_velocity(clean, noise, t)
        with torch.autocast(device.type, torch.bfloat16):
            states = encoder(tokens.to(device)).last_hidden_state
            predicted = denoiser(scheduler.add_noise(clean, noise, t), t, states).sample
        return (predicted.float() - target).pow(2).mean()

    modules = torch.nn.ModuleDict({"unet": unet})
    checkpoint = args.work_dir / "text_to_image.pt"
    if fit(modules, loss_of, checkpoint, args.steps, args.learning_rate, warmup=200, ema_decay=0.998, stop_at=args.stop_at):
        pipe = StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
        pipe.to(torch.float16).save_pretrained(args.output_dir)
        # The files are float16, but whoever names no dtype gets float32 from diffusers: transformers is told to agree.
        config = CLIPTextConfig.from_pretrained(args.output_dir, subfolder="text_encoder")
        config.dtype = torch.float32
        config.save_pretrained(args.output_dir / "text_encoder")
        # Tensors are named as in every older CLIP file: transformers 5.0 would not find newer ones and start from noise.
        weights = args.output_dir / "text_encoder" / "model.safetensors"
        named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(weights).items()}
        save_file(named, weights, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
