"""The text encoders in small: CLIP-L of all families, CLIP-G of SDXL and SD 3, T5 of SD 3, and their tokenizers."""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from toyworld.attributes import Picture
from toyworld.captions import caption

MAX_LENGTH = 32  # tokens, with start and end


def _corpus() -> list[str]:
    rng = np.random.default_rng(0)
    return [caption(Picture.sample(rng), rng) for _ in range(20000)]


def new_clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, trained on the world's captions: every word of theirs is one token."""
    corpus = _corpus() + [f"{a}{b}" for a, b in itertools.product(string.ascii_lowercase + string.digits, ["", "a"])] * 2
    specials = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))
    vocabulary = specials + [t for t, _ in sorted(bpe.get_vocab().items(), key=lambda item: item[1])]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(vocabulary)}, merges=merges, model_max_length=MAX_LENGTH, pad_token=pad_token)


def new_t5_tokenizer() -> T5Tokenizer:
    """T5's unigram tokenizer with the captions' words; other words are spelled."""
    words = sorted({word for text in _corpus() for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words), ("▁", -5.0)]
    pieces += [(letter, -10.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_LENGTH)


def _clip_config(tokenizer: CLIPTokenizer, dim: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_clip_l(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(_clip_config(tokenizer, 128, layers=3, heads=4))


def new_clip_g(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_clip_config(tokenizer, 160, layers=3, heads=5))


def new_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    model = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=320, d_kv=32, num_heads=8, d_ff=320, num_layers=2, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    )
    # Heads that look at different distances from the start: otherwise it does not find out within minutes that order matters.
    torch.nn.init.normal_(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    return model


def with_projection(clip_l: CLIPTextModel) -> CLIPTextModelWithProjection:
    """As SD 3 has its CLIP-L. The projection is the identity: the pooled state already says what the caption names."""
    model = CLIPTextModelWithProjection(clip_l.config)
    missing, _ = model.load_state_dict({f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in clip_l.state_dict().items()}, strict=False)
    assert missing == ["text_projection.weight"], missing
    torch.nn.init.eye_(model.text_projection.weight)
    return model


def state_of(encoder, ids: torch.Tensor, end: int) -> torch.Tensor:
    """What a text encoder knows at the end of its texts `ids` (n, tokens): (n, dim); CLIP's pooled, T5's at its token `end`."""
    if isinstance(encoder, T5EncoderModel):
        return encoder(ids).last_hidden_state[torch.arange(len(ids)), (ids == end).int().argmax(1)]
    return encoder(ids)[0] if isinstance(encoder, CLIPTextModelWithProjection) else encoder(ids).pooler_output


def save_text_encoder(encoder, folder: Path) -> None:
    """As float16, in the layout that every supported transformers reads.

    Whoever names no dtype gets float32 from diffusers: transformers is told to agree. CLIP's tensors are named as in every
    older file: transformers 5.0 would not find newer ones and start from noise.
    """
    encoder.half().save_pretrained(folder)
    config = type(encoder.config).from_pretrained(folder)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    if isinstance(encoder, CLIPTextModel):
        weights = folder / "model.safetensors"
        named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(weights).items()}
        save_file(named, weights, metadata={"format": "pt"})
