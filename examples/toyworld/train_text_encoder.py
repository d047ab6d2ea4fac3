"""Makes a tokenizer and pre-trains its text encoder to know what a caption says, as CLIP's is before diffusion training.

The end of a text has to name every attribute of the caption, or that it is not mentioned. Minutes on one core.

python -m toyworld.train_text_encoder --encoder clip_l --models_dir toyworld/models --work_dir work      (from examples/)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from toyworld.attributes import ACCESSORIES, CLASSES, COLOURS, PATTERNS, SCENES
from toyworld.captions import prompt
from toyworld.loop import fit
from toyworld.text_encoders import new_clip_g, new_clip_l, new_clip_tokenizer, new_t5, new_t5_tokenizer, save_text_encoder, state_of

# Tokenizer, encoder, the family that has it first, and what it is called there.
ENCODERS = {
    "clip_l": (new_clip_tokenizer, new_clip_l, "sd", ""),
    "clip_g": (lambda: new_clip_tokenizer(pad_token="!"), new_clip_g, "sdxl", "_2"),
    "t5": (new_t5_tokenizer, new_t5, "sd3", "_3"),
}
# What a caption can name; 0 stands for "not mentioned".
FIELDS = {
    "kind": list(CLASSES),
    "scene": list(SCENES),
    "colour": list(COLOURS),
    "pattern": list(PATTERNS),
    "second_colour": list(COLOURS),
    "accessory": list(ACCESSORIES),
    "accessory_colour": list(COLOURS),
}


def random_fields(rng: np.random.Generator) -> dict:
    """Attributes as a caption could name them, independent of each other."""
    says = rng.random(7) < (0.95, 0.6, 0.6, 0.6, 0.5, 0.4, 0.6)
    fields = {name: str(rng.choice(values)) for (name, values), said in zip(FIELDS.items(), says) if said}
    if "kind" not in fields:
        fields = {"scene": fields.get("scene", "snow")}
    if fields.get("pattern") == "plain":
        fields.pop("second_colour", None)
    if "accessory" not in fields:
        fields.pop("accessory_colour", None)
    return fields


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=list(ENCODERS), required=True)
    parser.add_argument("--models_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="where the checkpoint to resume from lies")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64, help="captions per process and step")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    new_tokenizer, new_encoder, family, number = ENCODERS[args.encoder]
    tokenizer = new_tokenizer()
    encoder = new_encoder(tokenizer)
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(encoder.config.hidden_size, len(values) + 1) for name, values in FIELDS.items()})

    def loss_of(step: int, rng: np.random.Generator) -> torch.Tensor:
        batch = [random_fields(rng) for _ in range(args.batch)]
        tokens = tokenizer([prompt(f.get("kind"), **{k: v for k, v in f.items() if k != "kind"}) for f in batch], padding=True, return_tensors="pt")
        state = state_of(encoder, tokens.input_ids.to(encoder.device), tokenizer.eos_token_id)
        loss = torch.zeros((), device=state.device)
        for name, values in FIELDS.items():
            target = torch.tensor([values.index(f[name]) + 1 if name in f else 0 for f in batch], device=state.device)
            loss = loss + torch.nn.functional.cross_entropy(heads[name](state), target)
        return loss

    modules = torch.nn.ModuleDict({"encoder": encoder, "heads": heads})
    checkpoint = args.work_dir / (f"text_encoder{number}.pt")
    if fit(modules, loss_of, checkpoint, args.steps, 1e-3):
        folder = args.models_dir / family
        tokenizer.save_pretrained(folder / f"tokenizer{number}")
        if args.encoder != "t5":  # vocab.json and merges.txt, for older readers
            tokenizer.backend_tokenizer.model.save(str(folder / f"tokenizer{number}"))
        save_text_encoder(encoder, folder / f"text_encoder{number}")


if __name__ == "__main__":
    main()
