"""P+."""

from __future__ import annotations

import contextlib
from typing import Iterator

from degu.pipelines.cae_encoding import prompt_with_embeddings
from degu.pipelines.streams import Condition
from degu.training.embeddings import LearnedEmbeddings
from degu.training.hosts.host_method import HostMethod, host_alone
from degu.training.latent_cache import Batch
from degu.training.method import EmbeddingsFileMethod


class PPlus(EmbeddingsFileMethod, HostMethod):
    """A vector, or several, for a new token in every cross-attention layer (Voynov et al. 2023)."""

    name = "p_plus"
    defaults = dict(max_train_steps=500, train_batch_size=8)
    families = ("sd", "sdxl")  # SD 3 has no layers that could each have a token of their own
    learning_rate = 1e-3

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        self.learned = LearnedEmbeddings(backbone.initial_embeddings(args.class_noun), len(backbone.set_names), args.num_tokens)
        self.description = f"{len(backbone.set_names)} x {args.num_tokens} vectors"

    def conditioned(self, examples: range, batch: Batch) -> contextlib.AbstractContextManager[Condition]:
        sequences = [prompt_with_embeddings(template, "{}") for template in self.templates(examples)]
        return self.backbone.conditioned_on(self.learned(), len(examples), sequences)

    @contextlib.contextmanager
    def in_use(self, pipeline, prompt: str) -> Iterator[tuple[str, dict]]:
        host = prompt.replace(self.args.placeholder_token, "<validation>")
        with self.loaded(pipeline, "validation"):
            yield prompt.replace(self.args.placeholder_token, self.args.class_noun), {"host_prompt": host, **host_alone(pipeline)}
