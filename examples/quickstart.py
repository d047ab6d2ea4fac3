"""Personalises a subject end to end on the small model that ships: five pictures in, that subject in new scenes out.

python examples/quickstart.py                       a rendered subject that the model has never seen
python examples/quickstart.py --subject 12          another one
python examples/quickstart.py --family sdxl         on the small model of another family: sd, sdxl, or sd3
python examples/quickstart.py --images DIR --class_noun dog     your own pictures (the model knows a toy world only)

Writes `comparison.png`, `guidance.png` and the trained CAE to --output_dir, and prints the oracle's scores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from pictures import enlarged, outlined
from PIL import Image
from shipped import SHIPPED, ShippedModel, starting_noise
from toyworld.captions import prompt
from toyworld.oracle import Oracle
from toyworld.references import reference_pictures, rendered, subject_of
from toyworld.scores import scores, table

from degu.training.instance_images import load_instance_images, training_view
from degu.training.picture_grid import picture_grid
from degu.training.train_cae import main as train_cae


def captions_for(noun: str, used_scenes: set[str]) -> list[dict[str, str]]:
    """Three scenes that no reference shows, and one more with an accessory."""
    scenes = [s for s in ("snow", "beach", "night", "grass", "desert", "water", "kitchen", "city") if s not in used_scenes][:4]
    captions = [{"kind": noun, "scene": scene} for scene in scenes]
    return captions + [captions.pop() | {"accessory": "hat", "accessory_colour": "black"}]


def caption_text(fields: dict[str, str]) -> str:
    return prompt(fields["kind"], **{name: value for name, value in fields.items() if name != "kind"})


def compared(model: ShippedModel, pipe, prompts: list[str], noun: str, seed: int) -> tuple[list[list], torch.Tensor]:
    """Pictures of `prompts` by the stock prompt, the CAE inside the prompt, DGM, and DGM with TCAM; and TCAM's last masks.

    `pipe` has a CAE loaded. Inside the prompt it stands where the class noun was, and is the only stream beside the null one, so that
    this is stock's guidance on "a V_1 ... V_N in the snow". Prompt by prompt, all start from the same noise.
    """
    shared = dict(num_inference_steps=model.steps, latents=starting_noise(pipe, len(prompts), seed), **model.call_options)
    stock = pipe(prompts, guidance_scale=model.guidance_scale, fidelity_guidance_scale=0.0, **shared).images
    unified = {"host_prompt": [prompt.replace(noun, f"<{pipe.get_active_cae_adapter()}>", 1) for prompt in prompts], "host_guidance_scale": model.guidance_scale}
    inside = pipe(prompts, guidance_scale=0.0, fidelity_guidance_scale=0.0, **unified, **shared).images
    pipe.disable_tcam()
    dgm = pipe(prompts, guidance_scale=model.guidance_scale, **shared).images
    pipe.enable_tcam(**model.tcam)
    tcam = pipe(prompts, guidance_scale=model.guidance_scale, **shared)
    return [stock, inside, dgm, tcam.images], tcam.subject_masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(SHIPPED), default="sd", help="which of the small models")
    parser.add_argument("--subject", type=int, default=4, help="seed of the rendered subject")
    parser.add_argument("--images", type=Path, default=None, help="folder with pictures of your own subject")
    parser.add_argument("--class_noun", default=None, help="its class; needed with --images")
    parser.add_argument("--output_dir", type=Path, default=Path("output") / "quickstart")
    parser.add_argument("--train_steps", type=int, default=None, help="by default what suits the model")
    parser.add_argument("--samples", type=int, default=4, help="pictures per prompt and column that are scored")
    args = parser.parse_args()
    if args.images is not None and args.class_noun is None:
        parser.error("--images needs --class_noun, e.g. --class_noun dog")
    diffusers_logging.set_verbosity_error()
    started, model = time.time(), SHIPPED[args.family]
    args.output_dir.mkdir(parents=True, exist_ok=True)

    # 1. The references.
    if args.images is None:
        pictures = reference_pictures(args.subject)
        noun, used_scenes, references = subject_of(args.subject).kind, {p.scene for p in pictures}, rendered(pictures)
        folder = args.output_dir / "references"
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(references):
            Image.fromarray(image).save(folder / f"{i:02d}.png")
        print(f"The subject: {subject_of(args.subject)}")
    else:
        folder, noun, used_scenes = args.images, args.class_noun, set()
        views = [training_view(i, 64, True, False, np.random.default_rng(0)).pixels for i in load_instance_images(folder)]
        references = [((v.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8) for v in views]

    # 2. The embeddings.
    train_cae([
        "--pretrained_model_name_or_path", str(model.folder), "--instance_data_dir", str(folder), "--class_noun", noun,
        "--output_dir", str(args.output_dir / "cae"), "--max_train_steps", str(args.train_steps or model.train_steps), "--report_to", "none", *model.train_options,
    ])  # fmt: skip
    trained = time.time()

    # 3. The same prompts and starting noise in every column.
    pipe = model.load()
    pipe.load_cae_embeddings(args.output_dir / "cae", adapter_name="subject")
    captions = captions_for(noun, used_scenes)
    fields = [c for c in captions for _ in range(args.samples)]
    prompts = [caption_text(c) for c in fields]
    columns, masks = compared(model, pipe, prompts, noun, seed=0)
    made = dict(zip(("stock prompt", "CAE in the prompt", "DGM", "DeGu"), columns))

    rows = []
    for i in range(len(captions)):
        first = i * args.samples
        row = [enlarged(references[i % len(references)])] + [enlarged(images[first]) for images in made.values()]
        rows.append([*row, outlined(made["DeGu"][first], masks[first].numpy())])
    picture_grid(rows, ["references", *made, "DeGu, mask"], prompts[:: args.samples]).save(args.output_dir / "comparison.png")

    # 4. The two sliders.
    scales_f, scales_e = (0.0, 1.0, 2.0, 4.0, 6.0), (1.0, 2.0, 4.0, 6.0)
    shared = dict(num_inference_steps=model.steps, latents=starting_noise(pipe, 1, seed=1), **model.call_options)
    sweep = [
        [enlarged(pipe(prompts[0], guidance_scale=e, fidelity_guidance_scale=f, **shared).images[0]) for f in scales_f] for e in scales_e
    ]
    picture_grid(sweep, [f"w_f = {f:g}" for f in scales_f], [f"w_e = {e:g}" for e in scales_e]).save(args.output_dir / "guidance.png")

    # 5. The scores.
    if args.images is None:  # the oracle knows the toy world only
        oracle = Oracle.load()
        print(table({name: scores(oracle, images, subject_of(args.subject), references, fields) for name, images in made.items()}))
    print(f"{args.output_dir}: {trained - started:.0f} s to the embeddings, {time.time() - started:.0f} s in all")


if __name__ == "__main__":
    main()
