"""Trains a subject's context-agnostic embeddings (CAE) on a frozen text-to-image model.

accelerate launch training/train_cae.py --pretrained_model_name_or_path BASE --instance_data_dir photos/ --class_noun dog
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Iterator, Mapping, Sequence

from degu.pipelines.streams import Condition
from degu.training.arguments import ADAMW_LEARNING_RATE, parse_args
from degu.training.cpu_processes import start_processes
from degu.training.embeddings import LearnedEmbeddings
from degu.training.latent_cache import Batch
from degu.training.loop import train
from degu.training.method import EmbeddingsFileMethod
from degu.training.model_card import write_model_card


class ContextAgnosticEmbeddingsMethod(EmbeddingsFileMethod):
    """N embeddings, by default for every layer, in a sequence without words (Eq. 4)."""

    name = "cae"
    learning_rate = ADAMW_LEARNING_RATE

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        sets = 1 if args.no_layerwise else len(backbone.set_names)
        self.learned = LearnedEmbeddings(backbone.initial_embeddings(args.class_noun), sets, args.num_tokens)
        self.description = f"{sets} x {args.num_tokens} embeddings"

    def conditioned(self, examples: range, batch: Batch) -> contextlib.AbstractContextManager[Condition]:
        return self.backbone.conditioned_on(self.learned(), len(examples))

    @contextlib.contextmanager
    def in_use(self, pipeline, prompt: str) -> Iterator[tuple[str, dict]]:
        with self.loaded(pipeline, "validation"):
            yield prompt, {}

    def write_model_card(self, folder: Path, metadata: Mapping[str, str], repository: str | None) -> None:
        write_model_card(folder, metadata, repository, type(self.backbone.pipeline).__name__)


def main(argv: Sequence[str] | None = None) -> None:
    train(parse_args(argv), ContextAgnosticEmbeddingsMethod)


if __name__ == "__main__":
    start_processes()
    main()
