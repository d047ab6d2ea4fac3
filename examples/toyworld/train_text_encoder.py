"""Makes the tokenizer and pre-trains the text encoder to know what a caption says, as CLIP's does before diffusion training.

The end-of-text state has to name every attribute of the caption, or that it is not mentioned. Minutes on one core.

python -m toyworld.train_text_encoder --output_dir models/sd --work_dir work        (from examples/)
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toyworld.attributes import ACCESSORIES, CLASSES, COLOURS, PATTERNS, SCENES, Picture
from toyworld.captions import caption, prompt
from toyworld.loop import fit

MAX_LENGTH = 32  # tokens, with start and end
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


def new_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, trained on the world's captions: every word of theirs is one token."""
    rng = np.random.default_rng(0)
    corpus = [caption(Picture.sample(rng), rng) for _ in range(20000)]
    corpus += [f"{a}{b}" for a, b in itertools.product(string.ascii_lowercase + string.digits, ["", "a"])] * 2
    specials = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))
    vocabulary = specials + [t for t, _ in sorted(bpe.get_vocab().items(), key=lambda item: item[1])]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(vocabulary)}, merges=merges, model_max_length=MAX_LENGTH)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="where the checkpoint to resume from lies")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64, help="captions per process and step")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = new_tokenizer()
    encoder = new_text_encoder(tokenizer)
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(128, len(values) + 1) for name, values in FIELDS.items()})

    def loss_of(step: int, rng: np.random.Generator) -> torch.Tensor:
        batch = [random_fields(rng) for _ in range(args.batch)]
        tokens = tokenizer([prompt(f.get("kind"), **{k: v for k, v in f.items() if k != "kind"}) for f in batch], padding=True, return_tensors="pt")
        state = encoder(tokens.input_ids.to(encoder.device)).pooler_output
        loss = torch.zeros((), device=state.device)
        for name, values in FIELDS.items():
            target = torch.tensor([values.index(f[name]) + 1 if name in f else 0 for f in batch], device=state.device)
            loss = loss + torch.nn.functional.cross_entropy(heads[name](state), target)
        return loss

    modules = torch.nn.ModuleDict({"encoder": encoder, "heads": heads})
    if fit(modules, loss_of, args.work_dir / "text_encoder.pt", args.steps, 1e-3):
        tokenizer.save_pretrained(args.output_dir / "tokenizer")
        tokenizer.backend_tokenizer.model.save(str(args.output_dir / "tokenizer"))  # vocab.json and merges.txt, for older readers
        encoder.half().save_pretrained(args.output_dir / "text_encoder")


if __name__ == "__main__":
    main()
