"""MS-Diffusion as a host on SDXL: pictures of one or several subjects, each acting in a box of its own (Wang et al. 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import IPAdapterPlusImageProjectionBlock
from PIL import Image
from transformers import CLIPImageProcessor

from degu.attention_processors import CrossAttentionLayer, LayerwiseAttnProcessor, LayerwiseStream
from degu.pipelines.hosts.host import HostCondition, LoadedHost
from degu.pipelines.hosts.host_weights import HostWeights
from degu.pipelines.safetensors_file import read_tensors

FORMAT, FORMAT_VERSION = "degu-ms-diffusion", "1"
HEAD_DIM = 64  # of the resampler's attention, in all that is published
_TEMPERATURE = 100.0  # of the boxes' Fourier features


class GroundingResampler(torch.nn.Module):
    """From a picture's CLIP states to a few tokens, asked for by what it shows and where it is to be.

    Args:
        queries: tokens for each picture.
        dim, image_dim, phrase_dim, output_dim: of its own states, CLIP's, the phrase's embedding, the U-Net's text.
        frequencies: of a box's Fourier features.
    """

    def __init__(self, queries: int, dim: int, image_dim: int, phrase_dim: int, output_dim: int, depth: int, frequencies: int = 8) -> None:
        super().__init__()
        self.queries, self.dim, self.frequencies = queries, dim, frequencies
        grounding = phrase_dim + 8 * frequencies  # sine and cosine of four coordinates
        self.latent_proj = torch.nn.Sequential(torch.nn.Linear(grounding, 2 * grounding), torch.nn.GELU(), torch.nn.Linear(2 * grounding, queries * dim))
        self.latent_norm = torch.nn.LayerNorm(dim)
        self.proj_in = torch.nn.Linear(image_dim, dim)
        self.layers = torch.nn.ModuleList([IPAdapterPlusImageProjectionBlock(dim, HEAD_DIM, dim // HEAD_DIM) for _ in range(depth)])
        self.attention_norm = torch.nn.LayerNorm(dim)
        self.proj_out = torch.nn.Linear(dim, output_dim)
        self.norm_out = torch.nn.LayerNorm(output_dim)

    def forward(self, images: torch.Tensor, phrases: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images: (n, tokens, image_dim), CLIP's penultimate states.
            phrases: (n, phrase_dim), the pooled text of what is to be seen.
            boxes: (n, 4), left, top, right, bottom in 0..1.

        Returns:
            (n, queries, output_dim)
        """
        bands = _TEMPERATURE ** (torch.arange(self.frequencies, device=boxes.device, dtype=torch.float32) / self.frequencies)
        phases = bands[:, None] * boxes.float()[:, None]  # (n, frequencies, 4)
        features = torch.stack([phases.sin(), phases.cos()], 2).flatten(1).to(phrases.dtype)
        latents = self.latent_norm(self.latent_proj(torch.cat([phrases, features], 1)).view(-1, self.queries, self.dim))
        states = self.proj_in(images)
        for layer in self.layers:
            latents = layer(states, latents, latents)
        return self.norm_out(self.proj_out(self.attention_norm(latents)))


class MSAdapter(torch.nn.Module):
    """MS-Diffusion's weights: the resampler, the tokens of the background, keys and values of every cross-attention layer.

    Args:
        state: by name, as `degu.pipelines.hosts.convert_ms_diffusion` writes them.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        dim, image_dim = state["resampler.proj_in.weight"].shape
        queries, output_dim = state["resampler.latent_proj.2.weight"].shape[0] // dim, state["resampler.proj_out.weight"].shape[0]
        frequencies, depth = 8, 1 + max(int(name.split(".")[2]) for name in state if name.startswith("resampler.layers."))
        phrase_dim = state["resampler.latent_proj.0.weight"].shape[1] - 8 * frequencies
        self.resampler = GroundingResampler(queries, dim, image_dim, phrase_dim, output_dim, depth, frequencies)
        self.dummy_tokens = torch.nn.Parameter(torch.empty(state["dummy_tokens"].shape))
        # By their number among all of the U-Net's attention processors, as MS-Diffusion counts them.
        numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("to_k.")})
        self.to_k, self.to_v = (
            torch.nn.ModuleDict({str(n): torch.nn.Linear(output_dim, state[f"{kind}.{n}.weight"].shape[0], bias=False) for n in numbers}) for kind in ("to_k", "to_v")
        )
        self.load_state_dict(state)
        self.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, file: str | Path) -> MSAdapter:
        """
        Raises:
            FileNotFoundError: no such file.
            ValueError: not what the conversion writes.
        """
        hint = "Convert ms_adapter.bin with `python -m degu.pipelines.hosts.convert_ms_diffusion`."
        return cls(read_tensors(file, "MS-Diffusion adapter", FORMAT, FORMAT_VERSION, hint)[1])

    def of_layers(self, unet: torch.nn.Module) -> dict[str, tuple[torch.nn.Linear, torch.nn.Linear]]:
        """Keys' and values' weights by the layer's name.

        Raises:
            ValueError: another U-Net's.
        """
        names = {str(number): name.removesuffix(".processor") for number, name in enumerate(unet.attn_processors)}
        expected = {number: unet.get_submodule(name).to_k.out_features for number, name in names.items() if unet.get_submodule(name).is_cross_attention}
        found = {number: layer.out_features for number, layer in self.to_k.items()}
        if found != expected or self.resampler.proj_out.out_features != unet.config.cross_attention_dim:
            raise ValueError(f"This adapter is for another U-Net: it has {len(found)} layers, the pipeline's has {len(expected)}, or they are of other sizes.")
        return {names[number]: (self.to_k[number], self.to_v[number]) for number in found}


@dataclass(frozen=True)
class ImageAttention:
    """What one layer's pixels see of the pictures: `keys` and `values` (1, tokens, channels), `bias` (pixels, tokens) that lets each
    pixel see its own box's, and `inside` (pixels, 1), 1 in some box and 0 elsewhere."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    inside: torch.Tensor


@dataclass
class ImagePromptStream(LayerwiseStream):
    """A stream whose rows see pictures beside their text: `pictures` by the layer's name, at `scale`."""

    pictures: Mapping[str, ImageAttention] | None = None
    scale: float = 1.0

    def wrapper(self, layer: CrossAttentionLayer, processor) -> ImagePromptAttnProcessor:
        return ImagePromptAttnProcessor(processor, self, layer)


class ImagePromptAttnProcessor(LayerwiseAttnProcessor):
    """Wraps whatever processor a cross-attention has, leaves the text to it, and adds what the stream's rows see of the pictures."""

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states=None, *args, **kwargs):
        """`hidden_states` (rows, pixels, channels)."""
        output = self.inner(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        rows, seen = self.stream.rows, self.stream.pictures[self.layer_name]

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states[rows]))
        key, value = (heads(x).expand(len(query), -1, -1, -1) for x in (seen.keys, seen.values))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen.bias, scale=attn.scale).transpose(1, 2).flatten(2) * seen.inside
        # The wrapped processor has put its own result through `to_out` already, which is linear but for its bias.
        out = attn.to_out[0]
        added = out(self.stream.scale * found) - (0 if out.bias is None else out.bias)
        output = output.clone()
        output[rows] += added / attn.rescale_output_factor
        return output


class MSDiffusion(LoadedHost):
    """
    Args:
        adapter: MS-Diffusion's weights, of the pipeline's float type and on its device.
        image_encoder: the `CLIPVisionModelWithProjection` that these were trained with (ViT-bigG), likewise.
        images: one picture for each subject.
        phrases: what each of them is, e.g. "dog"; best as the host prompt has it.
        boxes: where each is to be: left, top, right, bottom in 0..1.
        scale: how strongly the pictures act.

    Example:

        >>> host = MSDiffusion(MSAdapter.from_file("ms_adapter.safetensors"), encoder, [dog, cat], ["dog", "cat"], [(0, 0.2, 0.5, 1), (0.5, 0.2, 1, 1)])
        >>> pipe("a dog and a cat on the beach", host=host, host_prompt="a dog and a cat on the beach")

    Raises:
        ValueError: not one phrase and one box for each picture, or a box that is none.
    """

    def __init__(
        self, adapter: MSAdapter, image_encoder: torch.nn.Module, images: Sequence[Image.Image], phrases: Sequence[str],
        boxes: Sequence[Sequence[float]], scale: float = 0.6,
    ) -> None:  # fmt: skip
        super().__init__(HostWeights())
        if not len(images) == len(phrases) == len(boxes) > 0:
            raise ValueError(f"Give one phrase and one box for each picture; there are {len(images)} pictures, {len(phrases)} phrases and {len(boxes)} boxes.")
        for box in boxes:
            if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                raise ValueError(f"A box is (left, top, right, bottom) in 0..1; {tuple(box)} is none.")
        self.adapter, self.image_encoder, self.scale = adapter, image_encoder, scale
        self.images, self.phrases, self.boxes = list(images), list(phrases), [tuple(map(float, box)) for box in boxes]

    def encode(self, pipe, texts: Mapping[str, Any], stock: Mapping[str, Any]) -> HostCondition:
        if list(pipe._text_encoders()) != ["text_encoder", "text_encoder_2"]:
            raise ValueError(f"MS-Diffusion is for SDXL; this is a {type(pipe).__name__}.")
        layers = self.adapter.of_layers(pipe.unet)
        tokens, size = self.tokens(pipe), pipe._latent_size(stock)
        pictures, boxes = {}, {}
        for layer in pipe._layers():
            to_k, to_v = layers[layer.name]
            if layer.level not in boxes:  # the same for all layers of one size
                boxes[layer.level] = self._boxes_at(layer.map_size(size), tokens)
            pictures[layer.name] = ImageAttention(to_k(tokens), to_v(tokens), *boxes[layer.level])
        stream = ImagePromptStream(slice(0), {}, pictures=pictures, scale=self.scale)
        return replace(super().encode(pipe, texts, stock), stream_at=lambda timestep: stream)

    def tokens(self, pipe) -> torch.Tensor:
        """What stands for the background, then for each subject: (1, tokens, dim)."""
        device, dtype = pipe._execution_device, pipe.unet.dtype
        pixels = CLIPImageProcessor()(images=[image.convert("RGB") for image in self.images], return_tensors="pt").pixel_values
        states = self.image_encoder(pixels.to(device, dtype), output_hidden_states=True).hidden_states[-2]
        ids = pipe.tokenizer(self.phrases, padding="max_length", truncation=True, return_tensors="pt").input_ids
        phrases = pipe.text_encoder(ids.to(device)).pooler_output
        subjects = self.adapter.resampler(states, phrases.to(dtype), torch.tensor(self.boxes, device=device))
        return torch.cat([self.adapter.dummy_tokens, subjects.flatten(0, 1)[None]], 1)

    def _boxes_at(self, size: tuple[int, int], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's `bias` and `inside` for maps of `size` (h, w): a pixel in a box sees its subject's tokens, one in none sees nothing."""
        (h, w), background = size, self.adapter.dummy_tokens.shape[1]
        masks = torch.zeros(len(self.boxes), h, w, device=tokens.device)
        for mask, (left, top, right, bottom) in zip(masks, self.boxes):
            mask[math.floor(top * h) : math.ceil(bottom * h), math.floor(left * w) : math.ceil(right * w)] = 1
        masks = masks.flatten(1).T  # (pixels, subjects)
        inside = masks.amax(1, keepdim=True)
        seen = torch.cat([(1 - inside).expand(-1, background), masks.repeat_interleave(self.adapter.resampler.queries, 1)], 1)
        return ((1 - seen) * -10000.0).to(tokens.dtype), inside.to(tokens.dtype)
