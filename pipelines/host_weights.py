"""What of the model is the host's own: adapters or a whole denoiser that act in the host stream and nowhere else."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator

import torch
from diffusers.utils import is_peft_available


class HostWeights:
    """The weights that are the host's alone.

    Args:
        denoiser: a fine-tuned one that evaluates the host's rows; None: the pipeline's.
        modules: whose LoRA adapters are to act on the host's rows alone.

    Raises:
        ValueError: adapters that are fused into the weights, and cannot be told from these any more.
    """

    def __init__(self, denoiser: torch.nn.Module | None = None, modules: tuple[torch.nn.Module, ...] = ()) -> None:
        self.denoiser = denoiser
        self.adapters = [layer for module in modules for layer in _adapter_layers(module)]
        if any(layer.merged for layer in self.adapters):
            raise ValueError("`host_weights` is 'host', but the LoRA is fused into the weights: call `unfuse_lora()` first.")

    @property
    def apart(self) -> bool:
        """Whether the host's rows cannot be in one batch with the others."""
        return self.denoiser is not None or bool(self.adapters)

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """While it lasts, the model is the bare backbone that the CAE was trained on."""
        with self._switched(on=False):
            yield

    @contextlib.contextmanager
    def in_use(self, denoise: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
        """Inside `left_out`: the host's weights act. Yields what evaluates its rows, `denoise` or the host's own denoiser."""
        with self._switched(on=True):
            yield denoise if self.denoiser is None else self.denoiser.forward

    @contextlib.contextmanager
    def _switched(self, on: bool) -> Iterator[None]:
        before = [(layer, layer.disable_adapters) for layer in self.adapters]
        try:
            for layer, _ in before:
                layer._disable_adapters = not on  # not `enable_adapters`, which also changes what requires gradients
            yield
        finally:
            for layer, disabled in before:
                layer._disable_adapters = disabled


def _adapter_layers(module: torch.nn.Module) -> list:
    if not is_peft_available():
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
