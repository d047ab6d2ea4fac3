"""Textual inversion, and its directional kin."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Iterator, Mapping

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from degu.pipelines.streams import Condition
from degu.training.embeddings import LearnedDirections, LearnedEmbeddings
from degu.training.hosts.host_method import HostMethod
from degu.training.latent_cache import Batch


class TextualInversion(HostMethod):
    """One or several vectors for a new token, the same in all layers, learned in prompts of many templates (Gal et al. 2023)."""

    name, file_name = "textual_inversion", "learned_embeds.safetensors"
    defaults = dict(max_train_steps=3000, train_batch_size=8)
    families = ("sd", "sdxl")  # where diffusers loads textual inversions
    learning_rate = 5e-3

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        self.learned = self.new_vectors()
        self.description = f"{args.num_tokens} vectors"
        self._words = [f"<learned-{i}>" for i in range(args.num_tokens)]
        for _, tokenizer in backbone.text_encoders.values():
            tokenizer.add_tokens(self._words)  # this process's own tokenizers; nothing of them is saved

    def new_vectors(self) -> LearnedEmbeddings:
        return LearnedEmbeddings(self.backbone.initial_embeddings(self.args.class_noun), 1, self.args.num_tokens)

    def embeddings(self) -> LearnedEmbeddings:
        """The module whose output is the vectors."""
        return self.learned

    def spelled(self, prompt: str) -> str:
        """`prompt` with the new words for the placeholder."""
        return prompt.replace(self.args.placeholder_token, " ".join(self._words))

    @contextlib.contextmanager
    def conditioned(self, examples: range, batch: Batch) -> Iterator[Condition]:
        with self.inserted():
            condition = self.encoded([self.spelled(template.format(self.args.placeholder_token)) for template in self.templates(examples)])
        yield condition

    @contextlib.contextmanager
    def inserted(self, vectors: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
        """While it lasts, the text encoders read `vectors` (tokens, dim), by default the learned ones, for the new words."""
        vectors = vectors or {name: rows[0] for name, rows in self.embeddings()().items()}
        hooks = [hook for name in self.backbone.text_encoders for hook in self._inserting(name, vectors[name])]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _inserting(self, name: str, rows: torch.Tensor) -> tuple:
        """Hooks with which the text encoder's embedding gives `rows` (tokens, dim) for the new words, which it does not know."""
        encoder, _ = self.backbone.text_encoders[name]
        embedding = encoder.get_input_embeddings()
        known, seen = embedding.num_embeddings, []

        def remember(module, args):
            seen.append(args[0] - known)
            return (args[0].clamp(max=known - 1),)

        def insert(module, args, output):
            index = seen.pop()
            return torch.where(index[..., None] >= 0, rows.to(output.dtype)[index.clamp(min=0)], output)

        return embedding.register_forward_pre_hook(remember), embedding.register_forward_hook(insert)

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """As `load_textual_inversion` reads it."""
        rows = {name: value.detach().float().cpu()[0] for name, value in self.embeddings()().items()}
        names = {"text_encoder": self.args.placeholder_token} if len(rows) == 1 else {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
        tensors = {names[name]: value.contiguous() for name, value in rows.items()}
        save_file(tensors, folder / TextualInversion.file_name, {**metadata, "token": self.args.placeholder_token})

    @contextlib.contextmanager
    def in_use(self, pipeline, prompt: str) -> Iterator[tuple[str, dict]]:
        with self.inserted():
            yield self.spelled(prompt), {}


class DirectionalTextualInversion(TextualInversion):
    """Textual inversion that learns the vectors' directions; their lengths stay the vocabulary's mean (Kim et al. 2026).

    The directions' prior is a von Mises-Fisher distribution around the class noun's, its only parameter the paper's `kappa`. The
    optimizer is the loop's, where the paper has a Riemannian one.
    """

    name = "directional_textual_inversion"
    defaults = dict(max_train_steps=800, train_batch_size=4)
    learning_rate = 1e-2
    kappa = 1e-4

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        self._means = {name: F.normalize(vector, dim=0) for name, vector in backbone.initial_embeddings(args.class_noun).items()}

    def loss(self, condition: Condition, batch: Batch) -> torch.Tensor:
        towards_noun = sum((F.normalize(rows, dim=-1) @ self._means[name]).sum() for name, rows in self.learned().items())
        return super().loss(condition, batch) - self.kappa * towards_noun

    def new_vectors(self) -> LearnedDirections:
        lengths = {name: float(encoder.get_input_embeddings().weight.float().norm(dim=1).mean()) for name, (encoder, _) in self.backbone.text_encoders.items()}
        return LearnedDirections(self.backbone.initial_embeddings(self.args.class_noun), 1, self.args.num_tokens, lengths)
