"""Attention processors that give the fidelity stream its own context and read its attention maps."""

from degu.attention_processors.cross_attention import (
    AttentionMaps,
    CrossAttentionLayer,
    FidelityAttnProcessor,
    FidelityStream,
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
    "FidelityAttnProcessor",
    "FidelityStream",
    "JointAttentionLayer",
    "JointFidelityAttnProcessor",
    "JointFidelityStream",
    "cross_attention_layers",
    "joint_attention_layers",
]
