"""Checkpoints: a folder each, whole or not there at all, loadable as it is and enough to continue from."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Callable

import torch

_STATE = "training_state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".unfinished-"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in `output_dir`, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and (path / _STATE).is_file()]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name).group(1)))


def save_checkpoint(output_dir: Path, step: int, save: Callable[[Path], None], state: dict, limit: int | None) -> Path:
    """Writes `checkpoint-<step>` under another name and renames it; then drops the oldest beyond `limit`.

    `save` writes the result so far into a folder, `state` is what else it takes to continue.
    """
    folder, unfinished = output_dir / f"checkpoint-{step}", output_dir / f"{_UNFINISHED}{step}"
    for leftover in output_dir.glob(f"{_UNFINISHED}*"):  # of a run that was killed
        shutil.rmtree(leftover)
    unfinished.mkdir(parents=True)
    save(unfinished)
    torch.save(state, unfinished / _STATE)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(unfinished, folder)
    if limit is not None:
        for old in checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old)
    return folder


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The folder to resume from: a path, a name in `output_dir`, or `latest`.

    Raises:
        ValueError: there is no such checkpoint.
    """
    if wanted == "latest":
        found = checkpoints(output_dir)
        if not found:
            raise ValueError(f"`--resume_from_checkpoint latest`: {output_dir} has no checkpoint. Leave the flag out to start anew.")
        return found[-1]
    for folder in (Path(wanted), output_dir / wanted):
        if (folder / _STATE).is_file():
            return folder
    raise ValueError(f"`--resume_from_checkpoint` {wanted} is not a checkpoint folder; {output_dir} has {[p.name for p in checkpoints(output_dir)]}.")


def load_state(folder: Path) -> dict:
    """The training state of a checkpoint. Tensors and plain values only: nothing is unpickled into code."""
    return torch.load(folder / _STATE, map_location="cpu", weights_only=True)
