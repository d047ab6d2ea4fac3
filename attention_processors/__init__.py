"""Attention processors that give the fidelity stream its own context and read its attention maps."""

from degu.attention_processors.cross_attention import (
    AttentionMaps,
    CrossAttentionLayer,
    FidelityAttnProcessor,
    FidelityStream,
    cross_attention_layers,
)

__all__ = [
    "AttentionMaps",
    "CrossAttentionLayer",
    "FidelityAttnProcessor",
    "FidelityStream",
    "cross_attention_layers",
]
