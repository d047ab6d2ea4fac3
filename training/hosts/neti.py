"""NeTI."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Iterator, Mapping

import numpy as np
import torch

from degu.attention_processors import LayerwiseStream
from degu.pipelines.cae_encoding import prompt_with_embeddings
from degu.pipelines.hosts.neti import DEFAULT_NAME, NeTI, NeTIMapper, encode_with_bypass, save_mapper
from degu.pipelines.streams import Condition
from degu.training.hosts.host_method import HostMethod, host_alone
from degu.training.latent_cache import Batch


class NeTIMethod(HostMethod):
    """A network that gives a token for every timestep and layer, and what is added to the text behind it (Alaluf et al. 2023)."""

    name, file_name = "neti", DEFAULT_NAME
    defaults = dict(max_train_steps=1000, train_batch_size=8)
    families = ("sd",)
    learning_rate = 1e-3
    nested_dropout = 0.5  # share of the examples of which only the first so many hidden units are used

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        if args.num_tokens != 1:
            raise ValueError(f"NeTI learns one token; `--num_tokens` is {args.num_tokens}.")
        noun = backbone.initial_embeddings(args.class_noun)["text_encoder"]
        self.learned = NeTIMapper(len(noun), len(backbone.layers), norm=float(noun.norm()))
        self.description = f"a mapper of {sum(p.numel() for p in self.learned.parameters()) / 1e3:.0f} k weights"

    @contextlib.contextmanager
    def conditioned(self, examples: range, batch: Batch) -> Iterator[Condition]:
        encoder, tokenizer = self.backbone.text_encoders["text_encoder"]
        names, device = self.backbone.layer_names, batch.timesteps.device
        layers, keys, values = torch.arange(len(names), device=device), [], []
        for template, timestep, kept in zip(self.templates(examples), batch.timesteps, self._kept(examples)):
            embedding, bypass = self.learned(timestep.expand(len(names)), layers, torch.full_like(layers, kept))
            encoded = encode_with_bypass(encoder, tokenizer, *prompt_with_embeddings(template, "{}")(tokenizer, 1), embedding[:, None], bypass)
            keys.append(encoded[0])
            values.append(encoded[1])
        contexts, value_contexts = (dict(zip(names, torch.stack(part, 1))) for part in (keys, values))  # each (examples, length, hidden)
        with LayerwiseStream(slice(0, len(examples)), contexts, values=value_contexts).attached(self.backbone.layers):
            yield Condition(torch.zeros_like(contexts[names[0]]))

    def _kept(self, examples: range) -> list[int]:
        """How many hidden units each example uses: a function of its number alone."""
        width = self.learned.output_layer.in_features
        draws = [np.random.default_rng((self.args.seed, 4, example)) for example in examples]
        return [int(rng.integers(1, width)) if rng.random() < self.nested_dropout else width for rng in draws]

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """As `degu.pipelines.hosts.NeTI.from_file` reads it."""
        save_mapper(self.learned, folder / self.file_name, metadata)

    @contextlib.contextmanager
    def in_use(self, pipeline, prompt: str) -> Iterator[tuple[str, dict]]:
        host = NeTI(self.learned, self.args.placeholder_token)
        yield prompt.replace(self.args.placeholder_token, self.args.class_noun), {"host": host, "host_prompt": prompt, **host_alone(pipeline)}
