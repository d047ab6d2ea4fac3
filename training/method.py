"""What a training script learns: the interface between the loop and the methods."""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Iterator, Mapping

import torch

from degu.pipelines.cae_file import DEFAULT_NAME, save_cae
from degu.pipelines.streams import Condition
from degu.training.embeddings import LearnedEmbeddings
from degu.training.latent_cache import Batch


class Method(ABC):
    """Something that is learned from pictures of one subject on a frozen backbone.

    Attributes:
        name: of the runs in a tracker.
        file_name: of the result.
        learned: its parameters that require gradients are what is trained, in float32 whatever the model's precision.
        learning_rate: the default with AdamW; with `--scale_lr`, per example of the joint batch.
        description: for the log.
    """

    name: str
    file_name: str
    learning_rate: float
    learned: torch.nn.Module
    description: str

    def __init__(self, backbone, args) -> None:
        self.backbone, self.args = backbone, args

    @abstractmethod
    def conditioned(self, examples: range, batch: Batch) -> contextlib.AbstractContextManager[Condition]:
        """While it lasts, the denoiser is conditioned as the examples of these numbers, which are `batch`, want it; yields what it is told.

        The backward pass belongs inside: gradient checkpointing evaluates the denoiser a second time.
        """

    def loss(self, condition: Condition, batch: Batch) -> torch.Tensor:
        """The model's own denoising loss; scalar."""
        return self.backbone.loss(condition, batch)

    def before_step(self, step: int) -> None:
        """Called before the optimizer changes what is learned; steps count from 0."""

    def after_step(self, step: int) -> None:
        """Called after it."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What `load_state_dict` needs to continue."""
        return self.learned.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.learned.load_state_dict(state)

    @abstractmethod
    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Writes the result as it is now, in the form that pipelines load."""

    @abstractmethod
    def in_use(self, pipeline, prompt: str) -> contextlib.AbstractContextManager[tuple[str, dict]]:
        """While it lasts, `pipeline` has what is learned so far loaded; yields what to call it with: the prompt, other arguments."""

    def write_model_card(self, folder: Path, metadata: Mapping[str, str], repository: str | None) -> None:
        """Writes `README.md` beside the result."""


class EmbeddingsFileMethod(Method):
    """Learns sets of embeddings that `load_cae_embeddings` reads."""

    file_name = DEFAULT_NAME
    learned: LearnedEmbeddings

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        save_cae(self.learned.snapshot(self.backbone.set_names, metadata), folder / self.file_name, self.backbone.family)

    @contextlib.contextmanager
    def loaded(self, pipeline, adapter_name: str) -> Iterator[None]:
        """While it lasts, `pipeline` has the embeddings as they are now."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder), {})
            pipeline.load_cae_embeddings(folder, adapter_name=adapter_name)
        try:
            yield
        finally:
            pipeline.unload_cae_embeddings(adapter_name)
