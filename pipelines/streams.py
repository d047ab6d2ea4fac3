"""The streams' inputs: what conditions one, and taking from stock's classifier-free-guidance batch what each is to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import torch


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told: the text's `embeds` (n, tokens, dim) and, in families that have it, its `pooled` (n, dim).

    `embeds` is None where every layer is told something else.
    """

    embeds: torch.Tensor | None
    pooled: torch.Tensor | None = None


def map_batched(value: Any, rows: int, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Applies `function` to every tensor of `rows` rows in nested dicts, lists and tuples; leaves all else alone."""
    if isinstance(value, torch.Tensor):
        return function(value) if value.ndim > 0 and len(value) == rows else value
    if isinstance(value, dict):
        return {name: map_batched(item, rows, function) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_batched(item, rows, function) for item in value)
    return value
