"""What all examples of this folder begin with: their arguments, and the pipeline of the model's family with the subject's CAE."""

from __future__ import annotations

import argparse

from diffusers import DiffusionPipeline

from degu.pipelines import StableDiffusion3DeGuPipeline, StableDiffusionDeGuPipeline, StableDiffusionXLDeGuPipeline

CLASSES = {
    "StableDiffusionPipeline": StableDiffusionDeGuPipeline, "StableDiffusionXLPipeline": StableDiffusionXLDeGuPipeline,
    "StableDiffusion3Pipeline": StableDiffusion3DeGuPipeline,
}  # fmt: skip


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="Hub id or folder of the model")
    parser.add_argument("--cae", required=True, help="the subject's embeddings, as train_cae.py writes them")
    parser.add_argument("--prompt", required=True, help="plain, e.g. 'a dog in the snow'")
    parser.add_argument("--host_prompt", required=True, help="the host's own, e.g. 'a <my-dog> in the snow'")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="degu.png")
    return parser


def pipeline(args: argparse.Namespace):
    name = DiffusionPipeline.load_config(args.base)["_class_name"]
    pipe = CLASSES[name.replace("DeGu", "")].from_pretrained(args.base).to(args.device)
    pipe.load_cae_embeddings(args.cae, adapter_name="subject")
    return pipe
