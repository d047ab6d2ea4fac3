"""A stream's part in a U-Net's cross-attention: its own context per layer, and the maps that masks come from."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass, field
from typing import Iterator, Mapping

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention


@dataclass(frozen=True)
class CrossAttentionLayer:
    """One cross-attention module of a U-Net.

    `name` is its module path. `decoder`: whether it is in an up block. `level`: how often the latent's side is halved there,
    so that its maps have 1 / 2**level of the latent's side.
    """

    name: str
    module: Attention
    decoder: bool
    level: int

    def map_size(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of this layer's maps for a latent of `latent_size`: a U-Net halves odd sides upwards."""
        return tuple(-(-side // 2**self.level) for side in latent_size)


def cross_attention_layers(unet: torch.nn.Module) -> list[CrossAttentionLayer]:
    """The cross-attention modules of a `UNet2DConditionModel` in the order they are evaluated: down, mid, up."""
    deepest = len(unet.down_blocks) - 1
    layers = []
    for part, blocks in (("down_blocks", unet.down_blocks), ("mid_block", [unet.mid_block]), ("up_blocks", unet.up_blocks)):
        for index, block in enumerate(blocks):
            prefix = part if part == "mid_block" else f"{part}.{index}"
            level = {"down_blocks": index, "mid_block": deepest, "up_blocks": deepest - index}[part]
            for name, module in block.named_modules() if block is not None else ():
                if isinstance(module, Attention) and module.is_cross_attention:
                    layers.append(CrossAttentionLayer(f"{prefix}.{name}", module, part == "up_blocks", level))
    return layers


class AttentionMaps:
    """Running sums of the attention to one position of the context (or the mean over several), by level.

    Args:
        positions: the token's position in the context, as a slice; several are averaged.
    """

    def __init__(self, positions: slice) -> None:
        self.positions = positions
        self._sums: dict[int, torch.Tensor] = {}
        self._counts: dict[int, int] = {}

    def add(self, level: int, column: torch.Tensor) -> None:
        """Adds one layer's attention to the positions: (n, pixels), averaged over heads."""
        self._sums[level] = self._sums[level] + column if level in self._sums else column
        self._counts[level] = self._counts.get(level, 0) + 1

    def mean(self, level: int) -> torch.Tensor:
        """The average over the layers of `level`: (n, pixels), float32."""
        return self._sums[level] / self._counts[level]


@dataclass
class LayerwiseStream:
    """The rows of a stream that sees something of its own in every layer, in the batch that is being evaluated.

    Attributes:
        rows: where they are.
        contexts: what each layer sees, by its name: (1, tokens, dim), or (n, tokens, dim), one for each row.
        values: what the layer's values are made of, where that is not the same as its keys; of the same shapes, or None.
        maps: where the layers named in `captured` add their attention; None where no mask is wanted. Their contexts are the
            same for all n rows.
    """

    rows: slice
    contexts: Mapping[str, torch.Tensor]
    maps: AttentionMaps | None = None
    captured: frozenset[str] = frozenset()
    values: Mapping[str, torch.Tensor] | None = None
    _wrappers: dict[str, LayerwiseAttnProcessor] = field(default_factory=dict)

    def wrapper(self, layer: CrossAttentionLayer, processor) -> LayerwiseAttnProcessor:
        """What stands in for the layer's own processor."""
        return LayerwiseAttnProcessor(processor, self, layer)

    @contextlib.contextmanager
    def attached(self, layers: list[CrossAttentionLayer]) -> Iterator[None]:
        """Wraps the processors of `layers` for the length of one evaluation of the denoiser; always puts them back."""
        attached = []
        try:
            for layer in layers:
                # Not `attn.set_processor`, which logs "removing possibly trained weights" each time; and not `Module.__setattr__`, whose
                # checks would be made twice per layer and step: the place is that of the processor itself.
                attributes, modules = layer.module.__dict__, layer.module._modules
                place = attributes if "processor" in attributes else modules
                processor = place["processor"]
                wrapper = self._wrappers.get(layer.name)
                if wrapper is None or wrapper.inner is not processor:
                    wrapper = self._wrappers[layer.name] = self.wrapper(layer, processor)
                place["processor"] = wrapper
                attached.append((place, processor))
            yield
        finally:
            for place, processor in attached:
                place["processor"] = processor


class LayerwiseAttnProcessor(torch.nn.Module):
    """Wraps whatever processor a cross-attention module has: stock, LoRA, IP-Adapter, xFormers, or a custom one.

    All of the attention is left to the wrapped processor. This one replaces the context of the stream's rows by the layer's
    own and, where asked to, reads the attention that those rows pay to one token.

    It is a module so that a wrapped processor with weights (IP-Adapter's) stays part of the model and follows it when it
    is moved to another device.
    """

    def __init__(self, inner, stream: LayerwiseStream, layer: CrossAttentionLayer) -> None:
        super().__init__()
        self.inner = inner
        self.stream = stream
        self.layer_name, self.level = layer.name, layer.level
        self._attention: TokenAttention | None = None  # to the context that comes first
        # `Attention.forward` reads the signature of `processor.__call__` to see which keyword arguments it may pass on.
        call = self.__dict__["__call__"] = lambda *args, **kwargs: self(*args, **kwargs)
        call.__signature__ = inspect.signature(inner.__call__)

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states=None, *args, **kwargs):
        """`hidden_states` (rows, pixels, channels); `encoder_hidden_states` (rows, tokens, dim), or with an IP-Adapter a
        tuple of that and the image prompts' states."""
        stream, name = self.stream, self.layer_name
        text, *images = encoder_hidden_states if isinstance(encoder_hidden_states, tuple) else (encoder_hidden_states,)
        context = stream.contexts[name]
        start, stop, _ = stream.rows.indices(len(text))  # none are left where another stream's wrapper evaluates its rows apart
        if stream.maps is not None and name in stream.captured and start < stop:
            if self._attention is None or self._attention.context is not context:  # mostly the same for all steps, and so are the weights
                to_k = getattr(self.inner, "to_k_custom_diffusion", attn.to_k)
                self._attention = TokenAttention(attn, context, hidden_states.shape[2], stream.maps.positions, to_k)
            stream.maps.add(self.level, self._attention(hidden_states[start:stop]))
        context = context.expand(stop - start, -1, -1).to(text.dtype)
        values = None if stream.values is None else stream.values[name].expand(stop - start, -1, -1)

        def attend(hidden_states: torch.Tensor, text: torch.Tensor, images: list, own: slice | None) -> torch.Tensor:
            """Some of the batch's rows; `own` of them are the stream's."""
            with contextlib.nullcontext() if values is None or own is None else _values_from(attn, values, own):
                return self.inner(attn, hidden_states, (text, *images) if images else text, *args, **kwargs)

        if text.shape[1] == context.shape[1]:
            return attend(hidden_states, torch.cat([text[:start], context, text[stop:]]), images, slice(start, stop))
        # Prompt embeddings of another length than the CAE sequence (long, weighted prompts): evaluated apart.
        own = (slice(start, stop), context, slice(0, stop - start))
        parts = [(rows, text, of) for rows, text, of in ((slice(0, start), text[:start], None), own, (slice(stop, None), text[stop:], None)) if len(text)]
        return torch.cat([attend(hidden_states[rows], text, [[image[rows] for image in group] for group in images], of) for rows, text, of in parts])


@contextlib.contextmanager
def _values_from(attn: Attention, values: torch.Tensor, rows: slice) -> Iterator[None]:
    """While it lasts, `attn` makes these rows' values of `values`, whatever its processor hands to `attn.to_v`."""
    if attn.norm_cross:
        values = attn.norm_encoder_hidden_states(values)
    hook = attn.to_v.register_forward_pre_hook(lambda module, args: (torch.slice_scatter(args[0], values, start=rows.start, end=rows.stop),))
    try:
        yield
    finally:
        hook.remove()


def attention_keys(attn: Attention, context: torch.Tensor, to_k=None) -> torch.Tensor:
    """The scaled keys, heads apart: (n, heads, dim, tokens).

    Args:
        context: (n, tokens, dim).
        to_k: what makes the keys, where it is not `attn.to_k`.
    """
    if attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    key = (to_k or attn.to_k)(context).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    if attn.upcast_attention:
        key = key.float()
    return (key * attn.scale).transpose(2, 3)


class TokenAttention:
    """The attention that hidden states pay to some of the tokens of a context that stays: softmax(q k^T * scale) at these tokens.

    For such a context q k^T * scale is one linear layer of the hidden states, and the mean over tokens and heads another of the softmax.

    Args:
        context: (1, tokens, dim).
        channels: of the hidden states.
        positions: of the tokens.
        to_k: as for `attention_keys`.
    """

    def __init__(self, attn: Attention, context: torch.Tensor, channels: int, positions: slice, to_k=None) -> None:
        self.context, self.heads = context, attn.heads
        (keys,) = attention_keys(attn, context, to_k)
        # Whatever `to_q` is made of, LoRA included: its value at 0 and at the unit vectors.
        points = torch.cat([context.new_zeros(1, channels), torch.eye(channels, dtype=context.dtype, device=context.device)])
        query = attn.to_q(points).unflatten(-1, (attn.heads, -1)).transpose(0, 1).to(keys.dtype)
        bias, weight = (query @ keys).split([1, channels], dim=1)  # (heads, ..., tokens)
        self.weight, self.bias = (weight - bias).transpose(1, 2).flatten(0, 1).contiguous(), bias.flatten()
        chosen = torch.zeros(attn.heads, keys.shape[2], device=context.device)
        chosen[:, positions] = 1
        self.mean = (chosen / chosen.sum()).flatten()

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(n, pixels), float32, of `hidden_states` (n, pixels, channels)."""
        scores = F.linear(hidden_states.to(self.weight.dtype), self.weight, self.bias).unflatten(2, (self.heads, -1))
        return scores.softmax(3, dtype=torch.float32).flatten(2) @ self.mean
