"""Where this project's own defaults come from: sweeps on the shipped models, written to sweep.md, sweep_sdxl.md and sweep_sd3.md.

python examples/sweep.py [--family sd] [--stages masks training guidance hosts]

masks: on sd, which blur and which candidate resolutions find the subject on noised references, whose masks are known exactly;
on sd3, from which blocks and with which blur. training: learning rate and weight decay; on sdxl also, a set of embeddings per layer or per
transformer. guidance: w_f, and the step from which masking acts. hosts: on sd, w_h and w_e with a textual inversion as host.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from learned import host_of, trained, work_folder
from quickstart import caption_text, captions_for
from shipped import SHIPPED, ShippedModel, starting_noise
from toyworld.oracle import Oracle
from toyworld.references import reference_pictures, rendered, subject_of
from toyworld.renderer import render
from toyworld.scores import iou, scores, table

from degu.attention_processors import AttentionMaps, LayerwiseStream, cross_attention_layers
from degu.pipelines.cae_encoding import cae_sequence
from degu.pipelines.subject_mask import subject_masks
from degu.pipelines.tcam import TcamConfig
from degu.training.arguments import ADAMW_LEARNING_RATE, PRODIGY_LEARNING_RATE

SUBJECTS = (1, 5)
STAGES = ("masks", "training", "guidance", "hosts")


@torch.no_grad()
def mask_overlaps(pipe, adapters: dict[int, Path]) -> dict[str, dict[str, float]]:
    """Mean IoU with the exact masks, over subjects, references and noise levels; by token, resolutions and blur."""
    layers = cross_attention_layers(pipe.unet)
    levels = sorted({layer.level for layer in layers if layer.decoder}, reverse=True)
    captured = frozenset(layer.name for layer in layers if layer.decoder)
    overlaps: dict[tuple, dict[str, list[float]]] = {}
    for subject, folder in adapters.items():
        pipe.load_cae_embeddings(folder, adapter_name="subject")
        pictures = reference_pictures(subject)
        exact = torch.from_numpy(np.stack([render(p)[1] for p in pictures])).float()
        images = torch.from_numpy(np.stack(rendered(pictures))).permute(0, 3, 1, 2) / 127.5 - 1
        latents = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
        truth = torch.nn.functional.interpolate(exact[:, None], latents.shape[-2:], mode="area")[:, 0] > 0.5
        _, contexts = pipe._encode_subject(pipe.active_cae, [cae_sequence], {})
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(subject))
        for token, t in itertools.product(("sot", "eot", "subject"), (200, 400, 600, 800)):
            config = TcamConfig(start=0.0, token=token, kernel_size=3, sigma=1.0)
            maps = AttentionMaps(pipe._token_positions(config))
            noisy = pipe.scheduler.add_noise(latents, noise, torch.tensor(t))
            placeholder = next(iter(contexts.values())).expand(len(noisy), -1, -1)
            with LayerwiseStream(slice(0, len(noisy)), contexts, maps, captured).attached(layers):
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


def no_host(subject: int, prompts: list[str]) -> contextlib.AbstractContextManager[dict]:
    return contextlib.nullcontext({})


def generation_scores(
    model: ShippedModel, pipe, oracle: Oracle, adapters: dict[int, Path], with_host: Callable[[int, list[str]], contextlib.AbstractContextManager[dict]] = no_host, **options
) -> dict[str, float]:
    """Mean scores over the subjects, four prompts each, two pictures per prompt.

    `with_host(subject, prompts)` has a host loaded for as long as it lasts, and yields what the call is told of it.
    """
    collected = []
    for subject, folder in adapters.items():
        pipe.load_cae_embeddings(folder, adapter_name="subject")
        pictures = reference_pictures(subject)
        fields = captions_for(subject_of(subject).kind, {p.scene for p in pictures}) * 2
        latents = starting_noise(pipe, len(fields), seed=subject)
        shared = dict(guidance_scale=model.guidance_scale, num_inference_steps=20, latents=latents) | model.call_options | options
        prompts = [caption_text(f) for f in fields]
        with with_host(subject, prompts) as told:
            output = pipe(prompts, **shared, **told)
        row = scores(oracle, output.images, subject_of(subject), rendered(pictures), fields)
        if output.subject_masks is not None:
            row["mask IoU"] = float(iou(output.subject_masks > 0.5, oracle.read(output.images).region > 0).mean())
        collected.append(row)
        pipe.unload_cae_embeddings("subject")
    return {name: float(np.mean([c[name] for c in collected])) for name in collected[0]}


def block_sweep(model: ShippedModel, pipe, oracle: Oracle, folder: Path, steps: int | None) -> dict[str, dict[str, float]]:
    """By the transformer's blocks that masks are read from, and by the blur."""
    depth, rows = len(pipe.transformer.transformer_blocks), {}
    adapters = {s: trained(model, s, folder, steps) for s in SUBJECTS}
    third = depth // 3
    for first, last in ((0, third), (third, depth - third), (depth - third, depth), (0, depth // 2), (depth // 2, depth), (0, depth)):
        pipe.enable_tcam(**model.tcam | {"layers": tuple(range(first, last))})
        rows[f"blocks {first} to {last - 1}"] = generation_scores(model, pipe, oracle, adapters)
    for kernel in (1, 3, 5):
        pipe.enable_tcam(**model.tcam | {"kernel_size": kernel})
        rows[f"the example's blocks, blur {kernel}, 1"] = generation_scores(model, pipe, oracle, adapters)
    return rows


def training_sweep(model: ShippedModel, pipe, oracle: Oracle, folder: Path, steps: int | None) -> dict[str, dict[str, float]]:
    pipe.enable_tcam(**model.tcam)
    prodigy = hasattr(pipe, "transformer")
    default = PRODIGY_LEARNING_RATE if prodigy else ADAMW_LEARNING_RATE
    settings = {f"learning rate {default:g}, weight decay 0.01 (the defaults)": ()}
    settings |= {f"learning rate {rate:g}": ("--learning_rate", str(rate)) for rate in (0.5 * default, 2 * default, *(() if prodigy else (4 * default,)))}
    if not prodigy:
        settings["weight decay 0.1"] = ("--adam_weight_decay", "0.1")
    if model.folder.name == "sdxl":
        settings["one set per layer"] = ("--set_per", "layer")
        settings["one set for all"] = ("--no_layerwise",)
    if model.folder.name == "sd3":
        settings[f"AdamW, learning rate {ADAMW_LEARNING_RATE:g}"] = ("--optimizer", "adamw")
        settings["twice the steps"] = ("--max_train_steps", str(2 * (steps or model.train_steps)))
    return {
        name: generation_scores(model, pipe, oracle, {s: trained(model, s, folder, steps, *options) for s in SUBJECTS})
        for name, options in settings.items()
    }


def guidance_sweep(model: ShippedModel, pipe, oracle: Oracle, folder: Path, steps: int | None) -> dict[str, dict[str, float]]:
    adapters, rows = {s: trained(model, s, folder, steps) for s in SUBJECTS}, {}
    for w_f in (0.5 * model.guidance_scale, model.guidance_scale, 1.5 * model.guidance_scale):
        pipe.disable_tcam()
        rows[f"w_f {w_f:g}, no mask"] = generation_scores(model, pipe, oracle, adapters, fidelity_guidance_scale=w_f)
        for start in (0.0, 0.1, 0.2, 0.4):
            pipe.enable_tcam(**model.tcam | {"start": start})
            rows[f"w_f {w_f:g}, start {start:g}"] = generation_scores(model, pipe, oracle, adapters, fidelity_guidance_scale=w_f)
    return rows


def host_sweep(model: ShippedModel, pipe, oracle: Oracle, folder: Path, steps: int | None) -> dict[str, dict[str, float]]:
    """By w_e and w_h, at the default w_f, with a textual inversion of the same subject as host."""
    adapters = {s: trained(model, s, folder, steps) for s in SUBJECTS}
    inversions = {s: host_of("ti", model, s, folder, steps) for s in SUBJECTS}
    pipe.enable_tcam(**model.tcam)

    @contextlib.contextmanager
    def inversion(subject: int, prompts: list[str]) -> Iterator[dict]:
        pipe.load_textual_inversion(inversions[subject], weight_name="learned_embeds.safetensors", token="<my-subject>")
        try:
            yield {"host_prompt": [prompt.replace(subject_of(subject).kind, "<my-subject>", 1) for prompt in prompts]}
        finally:
            pipe.unload_textual_inversion()

    return {
        f"w_e {w_e:g}, w_h {w_h:g}": generation_scores(model, pipe, oracle, adapters, inversion, guidance_scale=w_e, host_guidance_scale=w_h)
        for w_e, w_h in itertools.product((0.5 * model.guidance_scale, model.guidance_scale), (1.0, 2.0, 3.0, 4.0))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(SHIPPED), default="sd", help="which of the small models")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--train_steps", type=int, default=None, help="by default what suits the model")
    parser.add_argument("--output", type=Path, default=None, help="by default the family's table beside this file")
    parser.add_argument("--work_dir", type=Path, default=None, help="keeps the trained embeddings, to continue from; by default a temporary folder")
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    model, oracle = SHIPPED[args.family], Oracle.load()
    pipe = model.load()
    with work_folder(args.work_dir) as folder:
        sections = {}
        if "masks" in args.stages and args.family == "sd":
            sections["Masks: mean IoU with the exact mask, on noised references"] = table(
                mask_overlaps(pipe, {s: trained(model, s, folder, args.train_steps) for s in SUBJECTS})
            )
        if "masks" in args.stages and args.family == "sd3":
            sections["Masks: which blocks, which blur"] = table(block_sweep(model, pipe, oracle, folder, args.train_steps))
        if "training" in args.stages:
            sections["Training"] = table(training_sweep(model, pipe, oracle, folder, args.train_steps))
        if "guidance" in args.stages:
            sections["Guidance and the start of masking"] = table(guidance_sweep(model, pipe, oracle, folder, args.train_steps))
        if "hosts" in args.stages and args.family == "sd":
            sections["A host's scale"] = table(host_sweep(model, pipe, oracle, folder, args.train_steps))
    steps = args.train_steps or model.train_steps
    text = f"# Sweeps on the small {args.family} model\n\nMade by `python examples/sweep.py --family {args.family}`; {steps} steps of training, subjects {SUBJECTS}, w_e = {model.guidance_scale:g}.\n"
    output = args.output or Path(__file__).with_name("sweep.md" if args.family == "sd" else f"sweep_{args.family}.md")
    output.write_text(text + "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items()))


if __name__ == "__main__":
    main()
