"""What the families with a U-Net share: cross-attention layers that each see the CAE in their own way."""

from __future__ import annotations

from typing import Any, Sequence

import torch

from degu.attention_processors import CrossAttentionLayer, LayerwiseStream, cross_attention_layers
from degu.pipelines.cae_encoding import Sequencer
from degu.pipelines.cae_file import ContextAgnosticEmbeddings, rows_by_layer
from degu.pipelines.degu_mixin import DeGuMixin
from degu.pipelines.guided_denoiser import Masking
from degu.pipelines.streams import Condition
from degu.pipelines.tcam import TcamConfig


class UNetDeGuMixin(DeGuMixin):
    """`DeGuMixin` for pipelines whose denoiser is `self.unet`; they add their text encoders and how these encode a CAE."""

    @property
    def _denoiser(self) -> torch.nn.Module:
        return self.unet

    def _layers(self, denoiser: torch.nn.Module | None = None) -> list[CrossAttentionLayer]:
        return cross_attention_layers(self.unet if denoiser is None else denoiser)

    def _check_cae(self, cae: ContextAgnosticEmbeddings, source: str) -> None:
        super()._check_cae(cae, source)
        rows_by_layer(cae, [layer.name for layer in self._layers()], source)

    def _encode_subject(
        self, cae: ContextAgnosticEmbeddings, sequences: Sequence[Sequencer], stock: dict[str, Any]
    ) -> tuple[Condition, dict[str, torch.Tensor]]:
        device, dtype = self._execution_device, self.unet.dtype
        embeddings = {name: rows.to(device) for name, rows in cae.embeddings.items()}
        contexts, pooled = self._encode_layers(embeddings, rows_by_layer(cae, [layer.name for layer in self._layers()]), sequences)
        contexts = {name: context.to(device, dtype) for name, context in contexts.items()}
        return Condition(None, None if pooled is None else pooled.to(device, dtype)), contexts

    def _encode_layers(
        self, embeddings: dict[str, torch.Tensor], set_of: dict[str, int], sequences: Sequence[Sequencer]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """What each layer, by name, sees of the set of embeddings that is its own in each of n sequences: (n, length, dim); and
        the pooled embeddings (n, dim) where the family has them. Differentiable in the embeddings."""
        encoded = [self._encode_cae(embeddings, sequence) for sequence in sequences]
        hidden = torch.stack([states for states, _ in encoded], 1)  # (sets, n, length, dim)
        pooled = None if encoded[0][1] is None else torch.cat([pooled for _, pooled in encoded])
        return {name: hidden[index] for name, index in set_of.items()}, pooled

    def _fidelity_stream(self, contexts: dict[str, torch.Tensor], masking: Masking | None) -> LayerwiseStream:
        levels = masking.levels if masking is not None else ()
        captured = frozenset(layer.name for layer in self._layers() if layer.decoder and layer.level in levels)
        return LayerwiseStream(slice(0), contexts, None, captured)

    def _levels(self, config: TcamConfig) -> tuple[int, ...]:
        """By default the decoder's two coarsest."""
        if config.layers is not None:
            raise ValueError("`layers` chooses blocks of an MMDiT; this denoiser is a U-Net, whose maps `resolutions` chooses.")
        available = sorted({layer.level for layer in self._layers() if layer.decoder}, reverse=True)
        if not available:
            raise ValueError("This denoiser's decoder has no cross-attention to read masks from: call `disable_tcam()`.")
        if config.resolutions is None:
            return tuple(available[:2])
        by_fraction = {2.0**-level: level for level in available}
        unknown = [fraction for fraction in config.resolutions if fraction not in by_fraction]
        if unknown:
            raise ValueError(f"`resolutions` {unknown} have no cross-attention in this decoder; it has {sorted(by_fraction)}.")
        return tuple(sorted({by_fraction[fraction] for fraction in config.resolutions}, reverse=True))

    def _encode_options(self, stock: dict[str, Any]) -> dict[str, Any]:
        return {"clip_skip": stock["clip_skip"], "lora_scale": (stock["cross_attention_kwargs"] or {}).get("scale")}
