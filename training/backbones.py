"""From a model's folder or Hub id to the backbone of its family."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from degu.training.sd_3_backbone import StableDiffusion3Backbone
from degu.training.sd_backbone import StableDiffusionBackbone
from degu.training.sd_xl_backbone import StableDiffusionXLBackbone

_BACKBONES = {
    "StableDiffusionPipeline": StableDiffusionBackbone,
    "StableDiffusionDeGuPipeline": StableDiffusionBackbone,
    "StableDiffusionXLPipeline": StableDiffusionXLBackbone,
    "StableDiffusionXLDeGuPipeline": StableDiffusionXLBackbone,
    "StableDiffusion3Pipeline": StableDiffusion3Backbone,
    "StableDiffusion3DeGuPipeline": StableDiffusion3Backbone,
}


def backbone_class(pretrained_model_name_or_path: str, revision: str | None) -> type[StableDiffusionBackbone]:
    """For the model's family, which its own `model_index.json` tells.

    Raises:
        ValueError: a family that training does not support.
    """
    config = DiffusionPipeline.load_config(pretrained_model_name_or_path, revision=revision)
    name = config.get("_class_name", "")
    if name not in _BACKBONES:
        raise ValueError(f"{pretrained_model_name_or_path} is a {name or 'model of unknown kind'}; training supports {list(_BACKBONES)}.")
    return _BACKBONES[name]


def load_backbone(
    pretrained_model_name_or_path: str, revision: str | None, variant: str | None, dtype: torch.dtype, device, without_t5: bool = False
) -> StableDiffusionBackbone:
    """Raises ValueError as `backbone_class` and `left_out` do."""
    kind = backbone_class(pretrained_model_name_or_path, revision)
    return kind(pretrained_model_name_or_path, revision, variant, dtype, device, **left_out(kind, without_t5))


def left_out(kind: type[StableDiffusionBackbone], without_t5: bool) -> dict[str, None]:
    """What `from_pretrained` is told for `--without_t5`.

    Raises:
        ValueError: the family has no T5.
    """
    if without_t5 and kind is not StableDiffusion3Backbone:
        raise ValueError(f"`--without_t5` is for Stable Diffusion 3; a {kind.pipeline_class.__name__} has no T5.")
    return {"text_encoder_3": None, "tokenizer_3": None} if without_t5 else {}
