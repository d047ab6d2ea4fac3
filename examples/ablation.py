"""The paper's ablation on the shipped model: the class noun, the CAE inside the prompt, DGM, and DGM with TCAM (DeGu).

python examples/ablation.py

Subjects that neither the model nor the sweep has seen, each in scenes that its references do not show. The oracle reads the
pictures back (`toyworld/scores.py` says how); the masks of the last step are compared with the oracle's idea of the subject's
region in the finished picture.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from diffusers.utils import logging as diffusers_logging
from quickstart import MODEL, STEPS, TRAIN_STEPS, caption_text, compared, starting_noise
from sweep import trained
from toyworld.attributes import SCENES
from toyworld.oracle import Oracle
from toyworld.references import reference_pictures, rendered, subject_of
from toyworld.scores import iou, scores, table
from unified import UnifiedPromptPipeline

from degu.pipelines import StableDiffusionDeGuPipeline

COLUMNS = ("class noun", "CAE in the prompt", "DGM", "DGM + TCAM")


def scored_columns(pipe, unified, oracle: Oracle, subject: int, cae: Path, scenes: int, seeds: int) -> tuple[dict[str, dict[str, float]], float]:
    """Scores by column, and the masks' mean IoU with the oracle's region."""
    pictures, identity = reference_pictures(subject), subject_of(subject)
    unused = [scene for scene in SCENES if scene not in {p.scene for p in pictures}][:scenes]
    fields = [{"kind": identity.kind, "scene": scene} for scene in unused] * seeds
    prompts, latents = [caption_text(f) for f in fields], starting_noise(pipe, len(fields), seed=subject)
    for p in (pipe, unified):
        p.load_cae_embeddings(cae, adapter_name="subject")
    made, masks = compared(pipe, unified, prompts, identity.kind, num_inference_steps=STEPS, latents=latents)
    for p in (pipe, unified):
        p.unload_cae_embeddings("subject")
    references = rendered(pictures)
    columns = {name: scores(oracle, images, identity, references, fields) for name, images in zip(COLUMNS, made)}
    return columns, float(iou(masks > 0.5, oracle.read(made[-1]).region > 0).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, nargs="+", default=range(10, 18), help="seeds of the rendered subjects")
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2, help="pictures per subject and scene")
    parser.add_argument("--train_steps", type=int, default=TRAIN_STEPS)
    parser.add_argument("--work_dir", type=Path, default=None, help="keeps the trained embeddings, to continue from; by default a temporary folder")
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    pipe, oracle = StableDiffusionDeGuPipeline.from_pretrained(MODEL), Oracle.load()
    unified = UnifiedPromptPipeline.from_pipe(pipe)
    for p in (pipe, unified):
        p.set_progress_bar_config(disable=True)
    collected: dict[str, list[dict[str, float]]] = {}
    overlaps = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for subject in args.subjects:
            columns, overlap = scored_columns(pipe, unified, oracle, subject, trained(subject, folder, args.train_steps), args.scenes, args.seeds)
            overlaps.append(overlap)
            for name, row in columns.items():
                collected.setdefault(name, []).append({k: v for k, v in row.items() if k != "accessory"})
            identity = subject_of(subject)
            print(f"{subject} ({identity.colour.name} {identity.kind}, {identity.second_colour.name} {identity.pattern}): mask IoU {overlap:.2f};",
                  ", ".join(f"{name} {row['fidelity']:.2f}/{row['editability']:.2f}" for name, row in columns.items()), flush=True)  # fmt: skip
    print(table({name: {k: float(np.mean([row[k] for row in rows])) for k in rows[0]} for name, rows in collected.items()}))
    print(f"Subjects: {len(overlaps)}; scenes: {args.scenes}; pictures of each: {args.seeds}; mean IoU of the last masks with the oracle's region: {np.mean(overlaps):.2f}")


if __name__ == "__main__":
    main()
