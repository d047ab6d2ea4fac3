"""Pictures by every checkpoint of a run of train_cae.py, to choose one: a row for each, a column for each prompt.

python training/compare_checkpoints.py my-dog --prompts "a dog in the snow" "a dog on the beach"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Sequence

import torch
from accelerate import PartialState
from PIL import Image
from safetensors import safe_open

from degu.pipelines.cae_file import DEFAULT_NAME
from degu.training.backbones import backbone_class, left_out
from degu.training.checkpoint import checkpoints
from degu.training.picture_grid import picture_grid

_SIDE = 256  # at least so large is a picture in the grid


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the --output_dir of train_cae.py")
    parser.add_argument("--prompts", nargs="+", required=True, help="plain prompts with the class noun")
    parser.add_argument("--pretrained_model_name_or_path", default=None, help="by default the model that the embeddings were trained on")
    parser.add_argument("--revision", default=None)
    parser.add_argument("--variant", default=None)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="what the model is loaded in")
    parser.add_argument("--guidance_scale", type=float, default=None, help="w_e; by default the pipeline's")
    parser.add_argument("--fidelity_guidance_scale", type=float, default=None, help="w_f; by default the pipeline's")
    parser.add_argument("--num_inference_steps", type=int, default=None, help="by default the pipeline's")
    parser.add_argument("--max_sequence_length", type=int, default=None, help="of T5 on SD 3, as in training")
    parser.add_argument("--without_t5", action="store_true", help="SD 3: leave T5 out, to save its memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="by default checkpoints.png in the run's folder")
    return parser.parse_args(argv)


def embeddings_files(run: Path) -> dict[str, Path]:
    """The files to compare by their label, in the order they were trained: the checkpoints', and the finished run's.

    Raises:
        ValueError: there is none.
    """
    files = {folder.name: folder / DEFAULT_NAME for folder in checkpoints(run)}
    if (run / DEFAULT_NAME).is_file():
        files["finished"] = run / DEFAULT_NAME
    if not files:
        raise ValueError(f"{run} has neither checkpoints nor {DEFAULT_NAME} in it: it has to be the --output_dir of a run of train_cae.py.")
    return files


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    files = embeddings_files(args.run)
    with safe_open(next(iter(files.values())), "pt") as file:
        base = args.pretrained_model_name_or_path or file.metadata()["base_model"]
    kind = backbone_class(base, args.revision)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)
    pipe = kind.pipeline_class.from_pretrained(base, revision=args.revision, variant=args.variant, dtype=dtype, **kind.pipeline_options, **left_out(kind, args.without_t5))
    pipe.to(PartialState().device)
    names = ("guidance_scale", "fidelity_guidance_scale", "num_inference_steps", "max_sequence_length")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    rows = []
    for label, file in files.items():
        pipe.load_cae_embeddings(file, adapter_name=label)
        generators = [torch.Generator().manual_seed(args.seed) for _ in args.prompts]  # the same noise in every row
        images = [pipe(prompt, generator=generator, **given).images[0] for prompt, generator in zip(args.prompts, generators)]
        pipe.unload_cae_embeddings(label)
        side = max(_SIDE, *images[0].size)
        rows.append([image.resize((side, side), Image.Resampling.LANCZOS) for image in images])
    output = args.output or args.run / "checkpoints.png"
    picture_grid(rows, args.prompts, list(files), side=side).save(output)
    print(f"Wrote {output}: {', '.join(files)}.")


if __name__ == "__main__":
    main()
