"""Custom Diffusion."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Iterator, Mapping

import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from safetensors.torch import save_file

from degu.pipelines.streams import Condition
from degu.training.embeddings import LearnedEmbeddings
from degu.training.hosts.textual_inversion import TextualInversion
from degu.training.latent_cache import Batch


class CustomDiffusion(TextualInversion):
    """A new token before the class noun, and the keys and values of the cross-attention (Kumari et al. 2023), without prior preservation."""

    name, file_name = "custom_diffusion", "pytorch_custom_diffusion_weights.safetensors"
    defaults = dict(max_train_steps=250, train_batch_size=8)
    families = ("sd",)
    learning_rate = 8e-5

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        processors = {name: CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False) for name in backbone.denoiser.attn_processors}
        for layer in backbone.layers:
            keys = layer.module.to_k
            processor = CustomDiffusionAttnProcessor(train_q_out=False, hidden_size=keys.out_features, cross_attention_dim=keys.in_features)
            processor.to_k_custom_diffusion.load_state_dict(keys.state_dict())
            processor.to_v_custom_diffusion.load_state_dict(layer.module.to_v.state_dict())
            processors[f"{layer.name}.processor"] = processor
        self._processors = processors
        backbone.denoiser.set_attn_processor(dict(processors))  # which empties what it is given
        self.learned = torch.nn.ModuleDict({
            "token": self.learned,
            "weights": torch.nn.ModuleList([processors[f"{layer.name}.processor"] for layer in backbone.layers]),
        })  # fmt: skip
        self.description = f"{args.num_tokens} vectors, keys and values of {len(backbone.layers)} layers"

    def embeddings(self) -> LearnedEmbeddings:
        return self.learned["token"]

    @contextlib.contextmanager
    def conditioned(self, examples: range, batch: Batch) -> Iterator[Condition]:
        prompt = self.spelled(f"a photo of a {self.args.placeholder_token} {self.args.class_noun}")
        with self.inserted():
            condition = self.encoded([prompt])
        yield Condition(condition.embeds.expand(len(examples), -1, -1))

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """As `load_textual_inversion` and `unet.load_attn_procs` read it."""
        super().save(folder, metadata)
        # Of layers that stay as they are, the loader wants to see something of no length.
        tensors = {name: torch.zeros(0) for name, processor in self._processors.items() if not processor.train_kv}
        for layer, processor in zip(self.backbone.layers, self.learned["weights"]):
            tensors |= {f"{layer.name}.processor.{name}": value.detach().float().cpu().contiguous() for name, value in processor.state_dict().items()}
        save_file(tensors, folder / self.file_name, {**metadata, "format": "pt"})
