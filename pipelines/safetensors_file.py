"""Reading this project's safetensors files: whole, of the right kind, of a known version."""

from __future__ import annotations

import os

import torch
from safetensors import SafetensorError, safe_open


def read_tensors(path: str | os.PathLike, what: str, format: str, version: str, hint: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The metadata and the tensors of a file whose metadata has this `format` and `format_version`.

    Args:
        what: it is, for messages.
        hint: where such files come from, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of another kind or version.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file (damaged, truncated, or another format): {error}. {hint}") from error
    if metadata.get("format") != format:
        raise ValueError(f"{path} is not a {what} file: its metadata has format {metadata.get('format')!r}, expected {format!r}. {hint}")
    if metadata.get("format_version") != version:
        raise ValueError(f"{path} has {what} format version {metadata.get('format_version')!r}; this version of degu reads {version!r}.")
    return metadata, tensors
