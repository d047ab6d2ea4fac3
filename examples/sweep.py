"""Where this project's own defaults come from: sweeps on the shipped model, written to sweep.md.

python examples/sweep.py [--stages masks training guidance]

masks: which blur and which candidate resolutions find the subject on noised references, whose masks are known exactly.
training: learning rate and weight decay. guidance: w_f, and the step from which masking acts.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from quickstart import GUIDANCE, MODEL, RESOLUTIONS, TRAIN_STEPS, caption_text, captions_for, starting_noise
from toyworld.oracle import Oracle
from toyworld.references import reference_pictures, rendered, subject_of
from toyworld.renderer import render
from toyworld.scores import iou, scores, table

from degu.attention_processors import AttentionMaps, FidelityStream, cross_attention_layers
from degu.pipelines import StableDiffusionDeGuPipeline
from degu.pipelines.subject_mask import subject_masks
from degu.pipelines.tcam import TcamConfig
from degu.training.train_cae import main as train_cae

SUBJECTS = (1, 5)
RESULTS = Path(__file__).parent / "sweep.md"


def trained(subject: int, folder: Path, steps: int, *options: str) -> Path:
    """Trains a CAE of the subject; returns its folder."""
    references, output = folder / f"references-{subject}", folder / f"cae-{subject}-{'-'.join(options) or 'default'}"
    references.mkdir(exist_ok=True)
    for i, image in enumerate(rendered(reference_pictures(subject))):
        Image.fromarray(image).save(references / f"{i}.png")
    if not (output / "cae_embeddings.safetensors").is_file():
        train_cae([
            "--pretrained_model_name_or_path", str(MODEL), "--instance_data_dir", str(references), "--class_noun", subject_of(subject).kind,
            "--output_dir", str(output), "--max_train_steps", str(steps), "--report_to", "none", *options,
        ])  # fmt: skip
    return output


@torch.no_grad()
def mask_overlaps(pipe, folder: Path, steps: int) -> dict[str, dict[str, float]]:
    """Mean IoU with the exact masks, over subjects, references and noise levels; by token, resolutions and blur."""
    layers = cross_attention_layers(pipe.unet)
    levels = sorted({layer.level for layer in layers if layer.decoder}, reverse=True)
    captured = frozenset(layer.name for layer in layers if layer.decoder)
    overlaps: dict[tuple, dict[str, list[float]]] = {}
    for subject in SUBJECTS:
        pipe.load_cae_embeddings(trained(subject, folder, steps), adapter_name="subject")
        pictures = reference_pictures(subject)
        exact = torch.from_numpy(np.stack([render(p)[1] for p in pictures])).float()
        images = torch.from_numpy(np.stack(rendered(pictures))).permute(0, 3, 1, 2) / 127.5 - 1
        latents = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
        truth = torch.nn.functional.interpolate(exact[:, None], latents.shape[-2:], mode="area")[:, 0] > 0.5
        contexts = pipe._fidelity(None, {})[0].contexts
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(subject))
        for token, t in itertools.product(("sot", "eot", "subject"), (200, 400, 600, 800)):
            config = TcamConfig(start=0.0, token=token, kernel_size=3, sigma=1.0)
            maps = AttentionMaps(pipe._token_positions(config))
            noisy = pipe.scheduler.add_noise(latents, noise, torch.tensor(t))
            placeholder = next(iter(contexts.values())).expand(len(noisy), -1, -1)
            with FidelityStream(slice(0, len(noisy)), contexts, maps, captured).attached(layers):
                pipe.unet(noisy, t, placeholder)
            sides = {level: latents.shape[-1] // 2**level for level in levels}
            by_level = {level: maps.mean(level).view(-1, sides[level], sides[level]) for level in levels}
            for chosen in ((levels[0],), (levels[1],), tuple(levels[:2])):
                for kernel, sigma in ((1, 1.0), (3, 0.5), (3, 1.0), (5, 1.0), (5, 2.0)) if token == "sot" else ((5, 1.0),):
                    masks, _ = subject_masks([by_level[i] for i in chosen], tuple(latents.shape[-2:]), invert=config.invert, kernel_size=kernel, sigma=sigma)
                    row = overlaps.setdefault((token, " + ".join(f"1/{2**i}" for i in chosen), f"{kernel}, {sigma:g}"), {})
                    row.setdefault(f"t = {t}", []).append(float(iou(masks.bool(), truth.bool()).mean()))
        pipe.unload_cae_embeddings("subject")
    result = {}
    for (token, resolutions, blur), row in overlaps.items():
        values = {name: float(np.mean(v)) for name, v in row.items()}
        result[f"[{token.upper()}] at {resolutions}, blur {blur}"] = {**values, "mean": float(np.mean(list(values.values())))}
    return dict(sorted(result.items(), key=lambda item: -item[1]["mean"]))


def generation_scores(pipe, oracle: Oracle, adapters: dict[int, Path], **options) -> dict[str, float]:
    """Mean scores over the subjects, four prompts each, two pictures per prompt."""
    collected = []
    for subject, folder in adapters.items():
        pipe.load_cae_embeddings(folder, adapter_name="subject")
        pictures = reference_pictures(subject)
        fields = captions_for(subject_of(subject).kind, {p.scene for p in pictures}) * 2
        latents = starting_noise(pipe, len(fields), seed=subject)
        images = pipe([caption_text(f) for f in fields], guidance_scale=GUIDANCE, num_inference_steps=20, latents=latents, **options).images
        collected.append(scores(oracle, images, subject_of(subject), rendered(pictures), fields))
        pipe.unload_cae_embeddings("subject")
    return {name: float(np.mean([c[name] for c in collected])) for name in collected[0]}


def training_sweep(pipe, oracle: Oracle, folder: Path, steps: int) -> dict[str, dict[str, float]]:
    rows = {}
    pipe.enable_tcam(resolutions=RESOLUTIONS)
    for rate, decay in ((2.5e-4, 1e-2), (5e-4, 1e-2), (1e-3, 1e-2), (2e-3, 1e-2), (5e-4, 1e-1)):
        adapters = {s: trained(s, folder, steps, "--learning_rate", str(rate), "--adam_weight_decay", str(decay)) for s in SUBJECTS}
        rows[f"learning rate {rate:g}, weight decay {decay:g}"] = generation_scores(pipe, oracle, adapters)
    return rows


def guidance_sweep(pipe, oracle: Oracle, folder: Path, steps: int) -> dict[str, dict[str, float]]:
    adapters, rows = {s: trained(s, folder, steps) for s in SUBJECTS}, {}
    for w_f in (2.0, 4.0, 6.0):
        pipe.disable_tcam()
        rows[f"w_f {w_f:g}, no mask"] = generation_scores(pipe, oracle, adapters, fidelity_guidance_scale=w_f)
        for start in (0.1, 0.2, 0.4):
            pipe.enable_tcam(start=start, resolutions=RESOLUTIONS)
            rows[f"w_f {w_f:g}, start {start:g}"] = generation_scores(pipe, oracle, adapters, fidelity_guidance_scale=w_f)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=["masks", "training", "guidance"], choices=["masks", "training", "guidance"])
    parser.add_argument("--train_steps", type=int, default=TRAIN_STEPS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work_dir", type=Path, default=None, help="keeps the trained embeddings, to continue from; by default a temporary folder")
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    pipe, oracle = StableDiffusionDeGuPipeline.from_pretrained(MODEL), Oracle.load()
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sections = {}
        if "masks" in args.stages:
            sections["Masks: mean IoU with the exact mask, on noised references"] = table(mask_overlaps(pipe, folder, args.train_steps))
        if "training" in args.stages:
            sections["Training"] = table(training_sweep(pipe, oracle, folder, args.train_steps))
        if "guidance" in args.stages:
            sections["Guidance and the start of masking"] = table(guidance_sweep(pipe, oracle, folder, args.train_steps))
    text = f"# Sweeps on the shipped model\n\nMade by `python examples/sweep.py --train_steps {args.train_steps}`; subjects {SUBJECTS}, w_e = {GUIDANCE:g}.\n"
    args.output.write_text(text + "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items()))


if __name__ == "__main__":
    main()
