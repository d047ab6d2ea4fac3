"""DreamBooth and DreamBooth-LoRA."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Iterator, Mapping

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from degu.pipelines.streams import Condition
from degu.training.hosts.host_method import HostMethod
from degu.training.latent_cache import Batch


class WeightMethod(HostMethod):
    """Learns weights of the denoiser, under one prompt with a rare word."""

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        self.prompt = args.instance_prompt or f"a photo of sks {args.class_noun}"
        self.learned = backbone.denoiser
        with torch.no_grad():
            self._condition = self.encoded([self.prompt])

    @contextlib.contextmanager
    def conditioned(self, examples: range, batch: Batch) -> Iterator[Condition]:
        embeds, pooled = self._condition.embeds, self._condition.pooled
        yield Condition(embeds.expand(len(examples), -1, -1), None if pooled is None else pooled.expand(len(examples), -1))

    @contextlib.contextmanager
    def in_use(self, pipeline, prompt: str) -> Iterator[tuple[str, dict]]:
        yield prompt, {}


class DreamBooth(WeightMethod):
    """All weights of the denoiser (Ruiz et al. 2023), without prior preservation."""

    name, file_name = "dreambooth", "unet"
    defaults = dict(max_train_steps=800, train_batch_size=1)
    learning_rate = 5e-4

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        backbone.denoiser.requires_grad_(True).float()
        self.file_name = "transformer" if backbone.family == "sd3" else "unet"
        self.description = f"{sum(p.numel() for p in backbone.denoiser.parameters()) / 1e6:.1f} M weights"

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """As `from_pretrained` of the denoiser's class reads it; the arguments `host_unet` and `host_transformer` take it."""
        self.backbone.denoiser.save_pretrained(folder / self.file_name)


class LoRA(WeightMethod):
    """Low-rank changes of the denoiser's attention (DreamBooth-LoRA)."""

    name, file_name = "lora", "pytorch_lora_weights.safetensors"
    defaults = dict(max_train_steps=800, train_batch_size=4)
    learning_rate = 1e-4

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        targets = ["to_k", "to_q", "to_v", "to_out.0"] + ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"] * (backbone.family == "sd3")
        backbone.denoiser.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=targets))
        cast_training_params(backbone.denoiser, torch.float32)
        self.description = f"LoRA of rank {args.rank}"

    def state_dict(self) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(self.backbone.denoiser)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        set_peft_model_state_dict(self.backbone.denoiser, state)

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """As `load_lora_weights` reads it."""
        pipeline, layers = self.backbone.pipeline, self.state_dict()
        if self.backbone.family == "sd3":
            pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
        else:
            pipeline.save_lora_weights(folder, unet_lora_layers=convert_state_dict_to_diffusers(layers))
