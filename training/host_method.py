"""Personalization methods that DeGu can have as hosts, each on the bare backbone and in the file format of its own users."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Iterator, Mapping

import numpy as np
import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from degu.pipelines.cae_encoding import prompt_with_embeddings
from degu.pipelines.streams import Condition
from degu.training.embeddings import LearnedDirections, LearnedEmbeddings
from degu.training.method import EmbeddingsFileMethod, Method

# Textual inversion's templates for objects; {} is the placeholder.
TEMPLATES = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}", "a photo of a dirty {}",
    "a dark photo of the {}", "a photo of my {}", "a photo of the cool {}", "a close-up photo of a {}", "a bright photo of the {}",
    "a cropped photo of a {}", "a photo of the {}", "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}",
    "a rendition of the {}", "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}", "a good photo of a {}",
    "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}", "a photo of the large {}", "a photo of a cool {}", "a photo of a small {}",
)  # fmt: skip


class HostMethod(Method):
    """Attributes:
    defaults: of the script's arguments, the paper's for this method where it says any.
    learning_rate: the default with AdamW.
    """

    defaults: dict = {}
    learning_rate: float

    def encoded(self, prompts: list[str]) -> Condition:
        """Prompts as the model's own pipeline encodes them."""
        others = {"prompt_2": None, "prompt_3": None} if self.backbone.family == "sd3" else {}  # stock requires these there
        encoded = self.backbone.pipeline.encode_prompt(
            prompt=prompts,
            **others,
            device=self.backbone.denoiser.device,  # not the pipeline's: the VAE has been moved away
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **self.backbone.call_options,
        )
        return Condition(encoded[0], encoded[2] if len(encoded) > 2 else None)


class TextualInversion(HostMethod):
    """One or several vectors for a new token, the same in all layers, learned in prompts of many templates (Gal et al. 2023)."""

    name, file_name = "textual_inversion", "learned_embeds.safetensors"
    defaults = dict(max_train_steps=3000, train_batch_size=8)
    learning_rate = 5e-3

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        if backbone.family == "sd3":
            raise ValueError("diffusers loads textual inversions on Stable Diffusion and SDXL, not on SD 3: use `--method lora` there.")
        self.learned = self.new_vectors()
        self.description = f"{args.num_tokens} vectors"
        self._words = [f"<learned-{i}>" for i in range(args.num_tokens)]
        for _, tokenizer in backbone.text_encoders.values():
            tokenizer.add_tokens(self._words)  # this process's own tokenizers; nothing of them is saved

    def new_vectors(self) -> LearnedEmbeddings:
        return LearnedEmbeddings(self.backbone.initial_embeddings(self.args.class_noun), 1, self.args.num_tokens)

    @contextlib.contextmanager
    def conditioned(self, examples: range) -> Iterator[Condition]:
        templates = _templates(self.args.seed, examples)
        hooks = [hook for encoder in self.backbone.text_encoders for hook in self._inserting(encoder)]
        try:
            condition = self.encoded([template.format(" ".join(self._words)) for template in templates])
        finally:
            for hook in hooks:
                hook.remove()
        yield condition

    def _inserting(self, name: str) -> tuple:
        """Hooks with which the text encoder's embedding gives the learned vectors for the new tokens, which it does not know."""
        encoder, _ = self.backbone.text_encoders[name]
        embedding, rows = encoder.get_input_embeddings(), self.learned()[name][0]
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
        rows = {name: value.detach().float().cpu()[0] for name, value in self.learned().items()}
        names = {"text_encoder": self.args.placeholder_token} if len(rows) == 1 else {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
        save_file({names[name]: value.contiguous() for name, value in rows.items()}, folder / self.file_name, {**metadata, "token": self.args.placeholder_token})

    @contextlib.contextmanager
    def in_use(self, pipeline, prompt: str) -> Iterator[tuple[str, dict]]:
        hooks = [hook for encoder in self.backbone.text_encoders for hook in self._inserting(encoder)]
        try:
            yield prompt.replace(self.args.placeholder_token, " ".join(self._words)), {}
        finally:
            for hook in hooks:
                hook.remove()


class DirectionalTextualInversion(TextualInversion):
    """Textual inversion that learns the vectors' directions; their lengths stay the vocabulary's mean (DTI, 2026; without its prior)."""

    name = "directional_textual_inversion"
    defaults = dict(max_train_steps=800, train_batch_size=4)
    learning_rate = 1e-2

    def new_vectors(self) -> LearnedDirections:
        lengths = {name: float(encoder.get_input_embeddings().weight.float().norm(dim=1).mean()) for name, (encoder, _) in self.backbone.text_encoders.items()}
        return LearnedDirections(self.backbone.initial_embeddings(self.args.class_noun), 1, self.args.num_tokens, lengths)


class PPlus(EmbeddingsFileMethod, HostMethod):
    """A vector, or several, for a new token in every cross-attention layer (Voynov et al. 2023)."""

    name = "p_plus"
    defaults = dict(max_train_steps=500, train_batch_size=8)
    learning_rate = 1e-3

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        if backbone.family == "sd3":
            raise ValueError("SD 3 has no layers that could each have a token of their own.")
        self.learned = LearnedEmbeddings(backbone.initial_embeddings(args.class_noun), len(backbone.set_names), args.num_tokens)
        self.description = f"{len(backbone.set_names)} x {args.num_tokens} vectors"

    def conditioned(self, examples: range) -> contextlib.AbstractContextManager[Condition]:
        sequences = [prompt_with_embeddings(template, "{}") for template in _templates(self.args.seed, examples)]
        return self.backbone.conditioned_on(self.learned(), len(examples), sequences)

    @contextlib.contextmanager
    def in_use(self, pipeline, prompt: str) -> Iterator[tuple[str, dict]]:
        """Guidance on the host stream alone is stock's guidance on its prompt, at stock's scale."""
        host = prompt.replace(self.args.placeholder_token, "<validation>")
        stock_scale = inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
        scales = {"guidance_scale": 0.0, "fidelity_guidance_scale": 0.0, "host_guidance_scale": stock_scale}
        with self.loaded(pipeline, "validation"):
            yield prompt.replace(self.args.placeholder_token, self.args.class_noun), {"host_prompt": host, **scales}


def _templates(seed: int, examples: range) -> list[str]:
    """Each example's template: a function of its number alone."""
    return [TEMPLATES[np.random.default_rng((seed, 3, example)).integers(len(TEMPLATES))] for example in examples]


class _WeightMethod(HostMethod):
    """Learns weights of the denoiser, under one prompt with a rare word."""

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        self.prompt = args.instance_prompt or f"a photo of sks {args.class_noun}"
        self.learned = backbone.denoiser
        with torch.no_grad():
            self._condition = self.encoded([self.prompt])

    @contextlib.contextmanager
    def conditioned(self, examples: range) -> Iterator[Condition]:
        embeds, pooled = self._condition.embeds, self._condition.pooled
        yield Condition(embeds.expand(len(examples), -1, -1), None if pooled is None else pooled.expand(len(examples), -1))

    @contextlib.contextmanager
    def in_use(self, pipeline, prompt: str) -> Iterator[tuple[str, dict]]:
        yield prompt, {}


class DreamBooth(_WeightMethod):
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


class LoRA(_WeightMethod):
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


METHODS: dict[str, type[HostMethod]] = {"ti": TextualInversion, "dti": DirectionalTextualInversion, "p_plus": PPlus, "dreambooth": DreamBooth, "lora": LoRA}
