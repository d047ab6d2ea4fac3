"""The CAE file: one subject's context-agnostic embeddings as safetensors. This module alone knows the format."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Collection, Mapping

import torch
from diffusers.utils import logging
from safetensors.torch import save_file

from degu.pipelines.safetensors_file import read_tensors

logger = logging.get_logger(__name__)

DEFAULT_NAME = "cae_embeddings.safetensors"
FORMAT = "degu-cae"
FORMAT_VERSION = "1"
_PREFIX = "cae."


@dataclass(frozen=True)
class ContextAgnosticEmbeddings:
    """What training learns of one subject.

    Attributes:
        embeddings: per text encoder (`text_encoder`, `text_encoder_2`, ...): float32 (layers, tokens, dim) on the CPU;
            `layers` is 1 where one set serves all layers.
        layer_names: the cross-attention modules the layers belong to, or modules around several of them, in order; empty
            where unknown or layers is 1.
        metadata: everything else the file says: strings.
    """

    embeddings: Mapping[str, torch.Tensor]
    layer_names: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return next(iter(self.embeddings.values())).shape[1]


def save_cae(cae: ContextAgnosticEmbeddings, path: str | os.PathLike, family: str) -> None:
    """Writes the file in one piece: under a temporary name in the same folder, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        **{name: value if isinstance(value, str) else json.dumps(value) for name, value in cae.metadata.items()},
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "family": family,
        "num_tokens": str(cae.num_tokens),
        "layer_names": json.dumps(list(cae.layer_names)),
    }
    tensors = {_PREFIX + name: rows.detach().float().cpu().contiguous() for name, rows in cae.embeddings.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_cae(path: str | os.PathLike, family: str, dims: Mapping[str, int], optional: Collection[str] = ()) -> ContextAgnosticEmbeddings:
    """Reads and checks a file for a model of `family` whose text encoders embed tokens in `dims` dimensions.

    Text encoders in `optional` are those that pipelines and files may do without: rows for one that the pipeline lacks are left
    out, and where the file has no rows for one that the pipeline has, neither have the embeddings.

    Raises:
        ValueError: the file is damaged, not a CAE, or made for another kind of model; the message says which.
    """
    hint = "CAE files are written by training/train_cae.py; textual inversions and LoRAs have loaders of their own."
    metadata, tensors = read_tensors(path, "CAE", FORMAT, FORMAT_VERSION, hint)
    return parse_cae(tensors, family, dims, optional, source=str(path), metadata=metadata)


def parse_cae(
    tensors: Mapping[str, torch.Tensor],
    family: str,
    dims: Mapping[str, int],
    optional: Collection[str] = (),
    source: str = "the given dict",
    metadata: Mapping[str, str] | None = None,
) -> ContextAgnosticEmbeddings:
    """Checks the tensors of a CAE, named as in the file; `metadata` may be missing. Raises ValueError as `read_cae` does."""
    metadata = dict(metadata or {})
    if metadata.get("family", family) != family:
        raise ValueError(
            f"{source} holds a CAE for the family {metadata['family']!r} (base model {metadata.get('base_model', 'unknown')}), "
            f"but this pipeline is of the family {family!r}. Train a CAE on this pipeline's base model."
        )
    left_out = sorted(_PREFIX + name for name in optional if name not in dims and _PREFIX + name in tensors)
    if left_out:
        logger.warning(f"{source}: {left_out} are left out, since the pipeline has no such text encoder.")
    found = set(tensors) - set(left_out)
    dims = {name: dim for name, dim in dims.items() if name not in optional or _PREFIX + name in found}
    expected = {_PREFIX + name for name in dims}
    if expected != found:
        raise ValueError(f"{source} holds the tensors {sorted(found)}, expected exactly {sorted(expected)}.")
    try:
        layer_names = tuple(json.loads(metadata.pop("layer_names", "[]")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{source}: the metadata entry `layer_names` is not a JSON list of names.") from error
    embeddings, shapes = {}, set()
    for name, dim in dims.items():
        rows = tensors[_PREFIX + name]
        where = f"{source}: `{_PREFIX}{name}`"
        if not isinstance(rows, torch.Tensor) or rows.ndim != 3 or 0 in rows.shape or not rows.is_floating_point():
            found_shape = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise ValueError(f"{where} has to be a float tensor [layers, tokens, dim], but is {found_shape}.")
        if rows.shape[2] != dim:
            raise ValueError(
                f"{where} has embeddings of {rows.shape[2]} dimensions, but the pipeline's {name} embeds tokens in {dim}. "
                f"The CAE was trained on another base model ({metadata.get('base_model', 'unknown')})."
            )
        if not torch.isfinite(rows).all():
            raise ValueError(f"{where} contains NaN or infinity; the training it comes from diverged.")
        shapes.add(tuple(rows.shape[:2]))
        embeddings[name] = rows.detach().float().cpu().clone()
    if len(shapes) > 1:
        raise ValueError(f"{source}: the text encoders' tensors differ in [layers, tokens]: {sorted(shapes)}.")
    layers, tokens = shapes.pop()
    if metadata.get("num_tokens", str(tokens)) != str(tokens):
        raise ValueError(f"{source}: the metadata says {metadata['num_tokens']} tokens, but the tensors have {tokens}.")
    if layers > 1 and layer_names and len(layer_names) != layers:
        raise ValueError(f"{source} names {len(layer_names)} layers, but its tensors have {layers}.")
    return ContextAgnosticEmbeddings(embeddings, layer_names, metadata)


def rows_by_layer(cae: ContextAgnosticEmbeddings, names: list[str], source: str = "the CAE") -> dict[str, int]:
    """Which row of the embeddings each of the model's cross-attention layers, given by name, uses.

    A name in the file is a layer's, or that of a module all of whose layers share the row.

    Raises:
        ValueError: the CAE has another number of layers than the model, or layers of other names.
    """
    layers = next(iter(cae.embeddings.values())).shape[0]
    if layers == 1:
        return dict.fromkeys(names, 0)
    stored = cae.layer_names or names
    rows = {name: index for index, module in enumerate(stored) for name in names if f"{name}.".startswith(f"{module}.")}
    unknown = [module for index, module in enumerate(stored) if index not in rows.values()]
    if unknown or len(rows) != len(names) or len(stored) != layers:
        raise ValueError(
            f"{source} is for other layers: it has embeddings for {layers} layers{f', among them {unknown[:3]}' if unknown else ''}; the "
            f"pipeline's denoiser has {len(names)} cross-attention layers{' and none of those names' if unknown else ''}. "
            "It was trained on another base model."
        )
    return rows
