"""Reading a text token's attention to the picture in an MMDiT's joint attention (Stable Diffusion 3)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention

from degu.attention_processors.cross_attention import LayerwiseAttnProcessor, LayerwiseStream


@dataclass(frozen=True)
class JointAttentionLayer:
    """One block's joint attention of text and picture.

    `name` is its module path, `index` its block's. `level`: 2**level latent pixels a side make one patch, so that its maps
    have 1 / 2**level of the latent's side.
    """

    name: str
    module: Attention
    index: int
    level: int

    def map_size(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of this layer's maps for a latent of `latent_size`."""
        return tuple(side // 2**self.level for side in latent_size)


def joint_attention_layers(transformer: torch.nn.Module) -> list[JointAttentionLayer]:
    """The joint attentions of an `SD3Transformer2DModel` in order; its blocks' second, image-only attention is none."""
    level = transformer.config.patch_size.bit_length() - 1
    blocks = enumerate(transformer.transformer_blocks)
    return [JointAttentionLayer(f"transformer_blocks.{index}.attn", block.attn, index, level) for index, block in blocks]


class JointFidelityStream(LayerwiseStream):
    """`LayerwiseStream` where text flows through all blocks: the CAE comes in with the batch, so only maps are read here."""

    def wrapper(self, layer: JointAttentionLayer, processor) -> JointFidelityAttnProcessor:
        return JointFidelityAttnProcessor(processor, self, layer)

    def attached(self, layers: list[JointAttentionLayer]) -> contextlib.AbstractContextManager[None]:
        return super().attached([layer for layer in layers if self.maps is not None and layer.name in self.captured])


class JointFidelityAttnProcessor(LayerwiseAttnProcessor):
    """Wraps whatever processor a joint attention has, leaves all of the attention to it, and reads one text token's row."""

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, *args, **kwargs):
        """`hidden_states` (rows, patches, channels); `encoder_hidden_states` (rows, tokens, channels)."""
        rows, maps = self.stream.rows, self.stream.maps
        maps.add(self.level, row_attention(attn, hidden_states[rows], encoder_hidden_states[rows], maps.positions))
        return self.inner(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def row_attention(attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, positions: slice) -> torch.Tensor:
    """What the text tokens at `positions` attend to in the picture, averaged over them and over the heads.

    The rows of softmax(q k^T * scale) over all keys, picture and text, that belong to these tokens; only those rows are
    computed. Of them the picture's part.

    Args:
        hidden_states: (n, patches, channels).
        encoder_hidden_states: (n, tokens, channels).

    Returns:
        (n, patches), float32
    """

    def heads(x: torch.Tensor, norm) -> torch.Tensor:
        x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return x if norm is None else norm(x)

    query = heads(attn.add_q_proj(encoder_hidden_states[:, positions]), attn.norm_added_q) * attn.scale
    keys = heads(attn.to_k(hidden_states), attn.norm_k), heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)
    scores = torch.cat([query @ key.transpose(2, 3) for key in keys], 3)
    return scores.softmax(3, dtype=torch.float32)[..., : hidden_states.shape[1]].mean((1, 2))
