"""CoRe: textual inversion that leaves the words around it as they are, then fine-tuning under it (Wu et al. 2024)."""

from __future__ import annotations

import argparse
import contextlib
from typing import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from degu.attention_processors import attention_keys
from degu.pipelines.streams import Condition
from degu.training.checkpoint import checkpoints
from degu.training.hosts.fine_tuning import DreamBooth
from degu.training.hosts.textual_inversion import TextualInversion
from degu.training.latent_cache import Batch

# What the words around the subject are compared in; {} is the subject.
CONTEXTS = (
    "a {} in the jungle", "a {} in the snow", "a {} on the beach", "a {} on a cobblestone street", "a {} on top of a wooden floor",
    "a {} with a city in the background", "a {} with a mountain in the background", "a {} in the desert at night", "a {} floating on water",
    "a {} on a purple rug in a forest", "a red {} in the garden", "a purple {} by the lake", "a shiny {} seen from the top",
    "a black {} on the dining table", "a cube shaped {}", "a wet {} under a tree", "an abstract painting of a {}", "a watercolor painting of a {}",
    "a pencil sketch of a {}", "a {} wearing a red hat", "a {} wearing a scarf", "a {} wearing sunglasses in the city", "a {} made of glass",
)  # fmt: skip

_PROMPT = "the encoded prompt"  # beside the weights in the second stage's checkpoints


class CoReFineTuning(DreamBooth):
    """The second stage: the denoiser's weights, under the learned vectors, which stay as they are."""

    name = "core_unet"
    families = ("sd",)
    learning_rate = 2e-6

    def __init__(self, backbone, args) -> None:
        backbone.pipeline.load_textual_inversion(args.output_dir.parent, weight_name=TextualInversion.file_name, token=args.placeholder_token)
        super().__init__(backbone, args)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**super().state_dict(), _PROMPT: self._condition.embeds}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if not torch.equal(state.pop(_PROMPT), self._condition.embeds.cpu()):
            folder = self.args.output_dir
            raise ValueError(f"The denoiser in {folder} was trained under other vectors than those there are now. Delete {folder} to train it anew.")
        super().load_state_dict(state)

    @staticmethod
    def arguments(first: argparse.Namespace) -> argparse.Namespace:
        """Of this stage, from those of the whole run."""
        output = first.output_dir / "fine_tuned"
        resume = first.resume_from_checkpoint if checkpoints(output) else None  # the first stage may not have got as far as the second
        own = {"output_dir": output, "resume_from_checkpoint": resume, "max_train_steps": first.unet_train_steps,
               "train_batch_size": first.unet_train_batch_size,
               "learning_rate": first.unet_learning_rate, "instance_prompt": f"a photo of a {first.placeholder_token}"}  # fmt: skip
        return argparse.Namespace(**{**vars(first), **own})


class CoRe(TextualInversion):
    """The first of two stages: the vectors. `then` is the second."""

    name = "core"
    defaults = dict(max_train_steps=300, train_batch_size=6)
    families = ("sd",)
    learning_rate = 5e-3
    then = CoReFineTuning
    embedding_weight, attention_weight = 1.5e-4, 0.05  # CoRe's appendix G
    rescaled = 0.4, 0.6  # part of the steps in which the vectors keep their lengths

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        self._noun = {name: vector.expand(args.num_tokens, -1) for name, vector in backbone.initial_embeddings(args.class_noun).items()}

    @contextlib.contextmanager
    def conditioned(self, examples: range, batch: Batch) -> Iterator[Condition]:
        self._contexts = [CONTEXTS[np.random.default_rng((self.args.seed, 5, example)).integers(len(CONTEXTS))] for example in examples]
        with super().conditioned(examples, batch) as condition:
            yield condition

    def loss(self, condition: Condition, batch: Batch) -> torch.Tensor:
        """The denoising loss and both of CoRe's (its Eq. 5)."""
        embedding, attention = self.context_losses(self._contexts, batch)
        return super().loss(condition, batch) + self.embedding_weight * embedding + self.attention_weight * attention

    def context_losses(self, contexts: list[str], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the other words of `contexts`, one for each example, are from what they are beside the class noun: in the text
        encoder's output (its Eq. 3), and in the mean attention they get (its Eq. 4)."""
        prompts = [self.spelled(context.format(self.args.placeholder_token)) for context in contexts]
        with self.inserted():
            own = self.encoded(prompts).embeds
        with torch.no_grad(), self.inserted(self._noun):
            nouns = self.encoded(prompts).embeds
        _, tokenizer = self.backbone.text_encoders["text_encoder"]
        words = set(tokenizer.convert_tokens_to_ids(self._words))
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        others = torch.tensor([[int(i) not in words for i in row] for row in ids], device=own.device)  # (n, length)
        embedding = (1 - F.cosine_similarity(own.float(), nouns.float(), dim=-1))[others].mean()
        attention = self._mean_attention(torch.cat([own, nouns]), batch)
        return embedding, (attention[: len(own)] - attention[len(own) :]).square()[others].mean()

    def _mean_attention(self, embeds: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The mean over pixels, heads and layers of the attention to each token (rows, length), for the batch's noisy latents."""
        sums, count = 0.0, 0

        def add(module, args, kwargs):
            nonlocal sums, count
            states = args[0] if args else kwargs["hidden_states"]
            keys = attention_keys(module, kwargs["encoder_hidden_states"])
            query = module.to_q(states).unflatten(-1, (module.heads, -1)).transpose(1, 2)
            probabilities = (query.to(keys.dtype) @ keys).softmax(3, dtype=torch.float32)  # (rows, heads, pixels, length)
            sums, count = sums + probabilities.sum((1, 2)), count + probabilities.shape[1] * probabilities.shape[2]

        hooks = [layer.module.register_forward_pre_hook(add, with_kwargs=True) for layer in self.backbone.layers]
        try:
            doubled = Batch(*(None if x is None else torch.cat([x, x]) for x in (batch.latents, batch.noise, batch.timesteps, batch.masks, batch.sizes)))
            self.backbone.predict(self.backbone.noisy(doubled), Condition(embeds), doubled)
        finally:
            for hook in hooks:
                hook.remove()
        return sums / count

    def before_step(self, step: int) -> None:
        self._lengths = {name: rows.detach().norm(dim=-1, keepdim=True) for name, rows in self.learned().items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """In the middle part of the steps the vectors get the lengths back that they had (its Eq. 6)."""
        start, stop = (round(part * self.args.max_train_steps) for part in self.rescaled)
        if start <= step < stop:
            for name, rows in self.learned().items():
                rows.mul_(self._lengths[name] / rows.norm(dim=-1, keepdim=True))
