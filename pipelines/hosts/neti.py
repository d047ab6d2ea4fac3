"""NeTI as a host: a token that is another one at every timestep and in every layer (Alaluf et al. 2023)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from degu.attention_processors import LayerwiseStream
from degu.pipelines.cae_encoding import encode_with_rows, prompt_with_embeddings
from degu.pipelines.hosts.host import Host, HostCondition
from degu.pipelines.safetensors_file import read_tensors

FORMAT, FORMAT_VERSION = "degu-neti", "1"
DEFAULT_NAME = "neti_mapper.safetensors"
BYPASS_SCALE = 0.2  # NeTI's, of the bypass against the state it is added to


class NeTIMapper(torch.nn.Module):
    """From a timestep and a cross-attention layer to a token's embedding, and to what is added to the encoded text (the bypass).

    Args:
        dim: of the text encoder's embeddings.
        layers: how many cross-attention layers there are, counted in the order they are evaluated.
        norm: length of the whole output; the class noun's embedding's.
        bypass: whether there is one.
        frequencies, time_anchors, sigma_t, sigma_l, hidden: of the positional encoding and the network.
    """

    def __init__(
        self, dim: int, layers: int, norm: float, bypass: bool = True, frequencies: int = 1024, time_anchors: int = 10,
        sigma_t: float = 0.03, sigma_l: float = 2.0, hidden: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.layers, self.norm, self.bypass = dim, layers, norm, bypass
        self.register_buffer("frequencies", torch.randn(frequencies, 2) * torch.tensor([sigma_t, sigma_l]))
        anchors = [(t, layer) for t in range(0, 1000, 1000 // time_anchors) for layer in range(layers)]
        self.input_layer = torch.nn.Linear(2 * frequencies, len(anchors))
        with torch.no_grad():
            self.input_layer.weight.copy_(self._positions(*torch.tensor(anchors).float().T))
        self.net = torch.nn.Sequential(
            torch.nn.Linear(len(anchors), hidden), torch.nn.LayerNorm(hidden), torch.nn.LeakyReLU(),
            torch.nn.Linear(hidden, hidden), torch.nn.LayerNorm(hidden), torch.nn.LeakyReLU(),
        )  # fmt: skip
        self.output_layer = torch.nn.Linear(hidden, 2 * dim if bypass else dim)

    def _positions(self, timesteps: torch.Tensor, layers: torch.Tensor) -> torch.Tensor:
        """Random Fourier features of both, (n, 2 * frequencies), of length 1."""
        phases = torch.stack([timesteps, layers], 1) @ self.frequencies.T
        return F.normalize(torch.cat([phases.sin(), phases.cos()], 1), dim=1)

    def forward(self, timesteps: torch.Tensor, layers: torch.Tensor, kept: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            timesteps: (n,) of 0..999.
            layers: (n,), their numbers.
            kept: (n,), how many of the hidden units are used, the first ones (nested dropout); None: all.

        Returns:
            The embedding (n, dim), and the bypass (n, dim) or None.
        """
        hidden = self.net(self.input_layer(self._positions(timesteps.float(), layers.float())))
        if kept is not None:
            hidden = hidden * (torch.arange(hidden.shape[1], device=hidden.device) < kept[:, None])
        output = F.normalize(self.output_layer(hidden), dim=1) * self.norm
        return (output[:, : self.dim], output[:, self.dim :]) if self.bypass else (output, None)


def save_mapper(mapper: NeTIMapper, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    own = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": json.dumps({n: getattr(mapper, n) for n in ("dim", "layers", "norm", "bypass")})}
    save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in mapper.state_dict().items()}, file, {**(metadata or {}), **own})


def load_mapper(file: str | Path) -> NeTIMapper:
    """
    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapper's.
    """
    path = Path(file) / DEFAULT_NAME if Path(file).is_dir() else Path(file)
    hint = "Convert what NeTI's own code has saved with `python -m degu.pipelines.hosts.convert_neti`."
    metadata, state = read_tensors(path, "NeTI mapper", FORMAT, FORMAT_VERSION, hint)
    mapper = mapper_for(state, **json.loads(metadata["config"]))
    mapper.load_state_dict(state)
    return mapper.eval().requires_grad_(False)


def mapper_for(state: Mapping[str, torch.Tensor], **config) -> NeTIMapper:
    """A new mapper of the shapes that `state` has."""
    anchors, hidden = state["input_layer.weight"].shape[0], state["net.0.weight"].shape[0]
    return NeTIMapper(**config, frequencies=len(state["frequencies"]), time_anchors=anchors // config["layers"], hidden=hidden)


def encode_with_bypass(text_encoder, tokenizer, ids: torch.Tensor, positions: slice, rows: torch.Tensor, bypass: torch.Tensor | None):
    """Encodes the sequence `ids` (length,) once for each of `rows` (n, 1, dim), which stand at `positions`.

    Returns:
        The last hidden states (n, length, hidden), and the same with `bypass` (n, hidden) added at `positions`, at
        `BYPASS_SCALE` of the length of what is there, before the last norm. The second is the first where there is no bypass.
    """
    norm = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
    before = []
    hook = norm.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    try:
        encoded = encode_with_rows(text_encoder, tokenizer, ids, positions, rows)[0]
    finally:
        hook.remove()
    if bypass is None:
        return encoded, encoded
    there = before[0][:, positions]
    added = there + BYPASS_SCALE * F.normalize(bypass.to(there), dim=-1)[:, None] * there.norm(dim=-1, keepdim=True)
    return encoded, torch.cat([encoded[:, : positions.start], norm(added), encoded[:, positions.stop :]], 1)


class NeTI(Host):
    """
    Args:
        mapper: what was learned.
        token: what stands for the subject in host prompts.
        kept: how many of the mapper's hidden units are used (1..128): fewer make pictures easier to edit; None: all.

    Example:

        >>> pipe("a dog in the snow", host=NeTI.from_file("neti_mapper.safetensors", token="<my-dog>"), host_prompt="a <my-dog> in the snow")
    """

    def __init__(self, mapper: NeTIMapper, token: str = "<subject>", kept: int | None = None) -> None:
        self.mapper, self.token, self.kept = mapper, token, kept

    @classmethod
    def from_file(cls, file: str | Path, token: str = "<subject>", kept: int | None = None) -> NeTI:
        """`file`: what `train_host.py --method neti` or `degu.pipelines.hosts.convert_neti` wrote, or its folder."""
        return cls(load_mapper(file), token, kept)

    def encode(self, pipe, texts: Mapping[str, Any], stock: Mapping[str, Any]) -> HostCondition:
        encoder, tokenizer = self._checked(pipe, texts)
        distinct = list(dict.fromkeys(texts["prompt"]))
        rows = [distinct.index(text) for text in texts["prompt"] for _ in range(stock["num_images_per_prompt"] or 1)]
        sequences = [prompt_with_embeddings(text, self.token)(tokenizer, 1) for text in distinct]
        names, device, dtype = [layer.name for layer in pipe._layers()], pipe._execution_device, pipe._denoiser.dtype
        mapper, numbers = self.mapper.to(device), torch.arange(len(names), device=device)
        kept = None if self.kept is None else torch.full_like(numbers, self.kept)
        stream = LayerwiseStream(slice(0), {})  # one for all steps, which keeps its wrappers

        def stream_at(timestep: torch.Tensor) -> LayerwiseStream:
            embedding, bypass = mapper(timestep.to(device).flatten()[:1].expand(len(names)), numbers, kept)
            encoded = [encode_with_bypass(encoder, tokenizer, *sequence, embedding[:, None], bypass) for sequence in sequences]
            keys, values = (torch.stack(part, 1)[:, rows].to(device, dtype) for part in zip(*encoded))  # (layers, images, length, hidden)
            stream.contexts = dict(zip(names, keys))
            stream.values = dict(zip(names, values)) if mapper.bypass else None
            return stream

        return HostCondition(None, None, stream_at)

    def _checked(self, pipe, texts: Mapping[str, Any]) -> tuple:
        """The text encoder and its tokenizer.

        Raises:
            ValueError: a pipeline or prompts that this is not for.
        """
        if list(pipe._text_encoders()) != ["text_encoder"]:
            raise ValueError(f"NeTI is for Stable Diffusion 1.x and 2.x; this is a {type(pipe).__name__}.")
        encoder, tokenizer = pipe._text_encoders()["text_encoder"]
        found = encoder.get_input_embeddings().weight.shape[1], len(pipe._layers())
        if found != (self.mapper.dim, self.mapper.layers):
            own = f"embeddings of {self.mapper.dim} and {self.mapper.layers} layers"
            raise ValueError(f"This NeTI mapper is for {own}; the pipeline has {found[0]} and {found[1]}.")
        if texts["prompt"] is None or any(text.count(self.token) != 1 for text in texts["prompt"]):
            raise ValueError(f"With NeTI every host prompt has {self.token!r} in it, once; these are {texts['prompt']}.")
        return encoder, tokenizer
