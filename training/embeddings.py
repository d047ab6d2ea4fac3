"""The learned rows: a parameter of their own, float32 whatever the precision of the model."""

from __future__ import annotations

from typing import Sequence

import torch

from degu.pipelines.cae_file import ContextAgnosticEmbeddings


class LearnedEmbeddings(torch.nn.Module):
    """N embeddings for each of `layers` layers, initialised from the class noun.

    Args:
        initial: the noun's embedding by text encoder, (dim,).
        layers: 1 for one set that serves all layers.
    """

    def __init__(self, initial: dict[str, torch.Tensor], layers: int, num_tokens: int) -> None:
        super().__init__()
        rows = {name: vector.detach().float().repeat(layers, num_tokens, 1) for name, vector in initial.items()}
        self.rows = torch.nn.ParameterDict({name: torch.nn.Parameter(value) for name, value in rows.items()})

    def forward(self) -> dict[str, torch.Tensor]:
        """The embeddings by text encoder, (layers, tokens, dim)."""
        return dict(self.rows)

    def snapshot(self, layer_names: Sequence[str], metadata: dict[str, str]) -> ContextAgnosticEmbeddings:
        """A copy to save, on the CPU."""
        rows = {name: value.detach().float().cpu().clone() for name, value in self.rows.items()}
        layers = next(iter(rows.values())).shape[0]
        return ContextAgnosticEmbeddings(rows, tuple(layer_names) if layers > 1 else (), metadata)


class LearnedDirections(LearnedEmbeddings):
    """`LearnedEmbeddings` of which only the direction is learned.

    Args:
        lengths: by text encoder.
    """

    def __init__(self, initial: dict[str, torch.Tensor], layers: int, num_tokens: int, lengths: dict[str, float]) -> None:
        super().__init__(initial, layers, num_tokens)
        self.lengths = lengths

    def forward(self) -> dict[str, torch.Tensor]:
        return {name: torch.nn.functional.normalize(rows, dim=-1) * self.lengths[name] for name, rows in self.rows.items()}


@torch.no_grad()
def noun_embedding(text_encoder, tokenizer, noun: str) -> torch.Tensor:
    """The embedding (dim,) of the class noun: its token's, or the mean where it is written with several.

    Raises:
        ValueError: an empty noun.
    """
    ids = tokenizer(noun, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"`--class_noun` {noun!r} has no token; give the subject's class, e.g. `dog`.")
    weight = text_encoder.get_input_embeddings().weight
    return weight[torch.tensor(ids, device=weight.device)].float().mean(0)
