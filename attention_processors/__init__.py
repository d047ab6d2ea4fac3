"""Attention processors that give a stream its own context in every layer and read its attention maps."""

from degu.attention_processors.cross_attention import (
    AttentionMaps,
    CrossAttentionLayer,
    LayerwiseAttnProcessor,
    LayerwiseStream,
    attention_keys,
    cross_attention_layers,
)
from degu.attention_processors.joint_attention import (
    JointAttentionLayer,
    JointFidelityAttnProcessor,
    JointFidelityStream,
    joint_attention_layers,
)

__all__ = [
    "AttentionMaps",
    "CrossAttentionLayer",
    "JointAttentionLayer",
    "JointFidelityAttnProcessor",
    "JointFidelityStream",
    "LayerwiseAttnProcessor",
    "LayerwiseStream",
    "attention_keys",
    "cross_attention_layers",
    "joint_attention_layers",
]
