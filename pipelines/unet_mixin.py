"""What the families with a U-Net share: cross-attention layers that each see the CAE in their own way."""

from __future__ import annotations

from typing import Any

import torch

from degu.attention_processors import CrossAttentionLayer, FidelityStream, cross_attention_layers
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

    def _layers(self) -> list[CrossAttentionLayer]:
        return cross_attention_layers(self.unet)

    def _check_cae(self, cae: ContextAgnosticEmbeddings, source: str) -> None:
        super()._check_cae(cae, source)
        rows_by_layer(cae, [layer.name for layer in self._layers()], source)

    def _fidelity(self, masking: Masking | None, stock: dict[str, Any]) -> tuple[FidelityStream, Condition | None]:
        layers, cae, device, dtype = self._layers(), self.active_cae, self._execution_device, self.unet.dtype
        hidden, pooled = self._encode_cae({name: rows.to(device) for name, rows in cae.embeddings.items()})
        hidden, rows = hidden.to(device, dtype), rows_by_layer(cae, [layer.name for layer in layers])
        contexts = {name: hidden[row : row + 1] for name, row in rows.items()}
        levels = masking.levels if masking is not None else ()
        captured = frozenset(layer.name for layer in layers if layer.decoder and layer.level in levels)
        return FidelityStream(slice(0), contexts, None, captured), None if pooled is None else Condition(None, pooled.to(device, dtype))

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
