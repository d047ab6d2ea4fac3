"""What of the model is the host's own: adapters or attention processors that act in the host stream and nowhere else."""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    CustomDiffusionXFormersAttnProcessor,
)
from diffusers.utils import is_peft_available

_CUSTOM_DIFFUSION = (CustomDiffusionAttnProcessor, CustomDiffusionAttnProcessor2_0, CustomDiffusionXFormersAttnProcessor)


class HostWeights:
    """LoRA adapters, and Custom Diffusion's processors, that can be switched off and on. False where there are none.

    Args:
        modules: in which they are.

    Raises:
        ValueError: adapters that are fused into the weights, and cannot be told from these any more.
    """

    def __init__(self, *modules: torch.nn.Module) -> None:
        self.adapters = [layer for module in modules for layer in _adapter_layers(module)]
        attentions = [layer for module in modules for layer in module.modules() if isinstance(layer, Attention)]
        self.processors = [(layer, layer.processor) for layer in attentions if isinstance(layer.processor, _CUSTOM_DIFFUSION)]
        if any(layer.merged for layer in self.adapters):
            raise ValueError("`host_weights` is 'host', but the LoRA is fused into the weights: call `unfuse_lora()` first.")

    def __bool__(self) -> bool:
        return bool(self.adapters or self.processors)

    @contextlib.contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """While it lasts, all of it acts, or nothing; afterwards it is as before."""
        before = [(layer, layer.disable_adapters) for layer in self.adapters]
        processors = [(attention, attention.processor) for attention, _ in self.processors]
        try:
            for layer, _ in before:
                layer._disable_adapters = not on  # not `enable_adapters`, which also changes what requires gradients
            for attention, processor in self.processors:
                _set_processor(attention, processor if on else AttnProcessor2_0())
            yield
        finally:
            for layer, disabled in before:
                layer._disable_adapters = disabled
            for attention, processor in processors:
                _set_processor(attention, processor)


def _set_processor(attn: Attention, processor) -> None:
    """`attn.set_processor` without its log of "removing possibly trained weights"."""
    attn._modules.pop("processor", None)
    attn.__dict__.pop("processor", None)
    attn.processor = processor


def _adapter_layers(module: torch.nn.Module) -> list:
    if not is_peft_available():
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
