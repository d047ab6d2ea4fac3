"""What the pipelines of all families share: the settings, and the frame around stock's `__call__`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import fields, replace
from typing import Any, Callable, Mapping, Sequence

import torch

from degu.attention_processors import CrossAttentionLayer, LayerwiseStream, JointAttentionLayer
from degu.pipelines.cae_encoding import Sequencer, cae_sequence, prompt_with_embeddings
from degu.pipelines.cae_file import ContextAgnosticEmbeddings
from degu.pipelines.cae_loader import CaeLoaderMixin
from degu.pipelines.families import Family
from degu.pipelines.guided_denoiser import GuidedDenoiser, Masking
from degu.pipelines.host_weights import HostWeights
from degu.pipelines.streams import Condition
from degu.pipelines.tcam import TcamConfig
from degu.pipelines.user_mask import latent_masks


def extends(stock_call: Callable) -> Callable:
    """Decorates a `__call__` that adds keyword-only arguments to `stock_call`, so that its signature shows both."""

    def decorate(call: Callable) -> Callable:
        stock = inspect.signature(stock_call)
        added = [p for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY]
        parameters = list(stock.parameters.values())
        at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
        call.__signature__ = stock.replace(parameters=parameters[:at] + added + parameters[at:])
        return call

    return decorate


class DeGuMixin(CaeLoaderMixin, ABC):
    """Goes before a stock pipeline in the bases of a DeGu pipeline. Adds no component: all it keeps is state."""

    _degu_family: Family
    _output_class: type  # stock's output with a field `subject_masks`
    _guided: GuidedDenoiser | None = None  # set for the length of a call
    _tcam: TcamConfig | None = None  # None: the family's
    _tcam_enabled = True
    _stream_slicing = False
    _last_masks: torch.Tensor | None = None

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """As stock's, but keeps the given pipeline's dtype: the weights are shared, and stock's would cast them."""
        if kwargs.get("torch_dtype") is None and kwargs.get("dtype") is None:
            kwargs["dtype"] = pipeline.dtype
        return super().from_pipe(pipeline, **kwargs)

    # --- settings ---

    def enable_tcam(
        self,
        start: float | None = None,
        token: str | None = None,
        resolutions: Sequence[float] | None = None,
        layers: Sequence[int] | None = None,
        kernel_size: int | None = None,
        sigma: float | None = None,
    ) -> None:
        """Turns masking on, as it is by default. What is left out, or None, is the family's default.

        Args:
            start: fraction of the steps, 0..1, before masking acts.
            token: whose attention the mask is read from: "sot", "eot", or "subject".
            resolutions: candidate map sizes as fractions of the latent's side, e.g. `(1/4, 1/2)`.
            layers: for MMDiT only.
            kernel_size, sigma: of the blur, in map pixels.
        """
        given = {"start": start, "token": token, "resolutions": resolutions, "layers": layers, "kernel_size": kernel_size, "sigma": sigma}
        config = replace(self._degu_family.tcam, **{name: value for name, value in given.items() if value is not None})
        self._levels(config)
        self._tcam, self._tcam_enabled = config, True

    def disable_tcam(self) -> None:
        """Turns masking off: the streams are mixed everywhere (Eq. 5). A mask given to a call is still used."""
        self._tcam_enabled = False

    @property
    def tcam(self) -> TcamConfig:
        """The settings in use, also while masking is off."""
        return self._tcam or self._degu_family.tcam

    def enable_stream_slicing(self) -> None:
        """Evaluates the streams one after another: the memory of one, the same images within float error."""
        self._stream_slicing = True

    def disable_stream_slicing(self) -> None:
        self._stream_slicing = False

    @property
    def active_cae(self) -> ContextAgnosticEmbeddings | None:
        return self._cae_adapters.get(self.get_active_cae_adapter())

    @property
    def subject_masks(self) -> torch.Tensor | None:
        """(images, h, w) of 0 and 1 at latent size: in a callback this step's masks, afterwards the last used; else None."""
        return self._guided.masks if self._guided is not None else self._last_masks

    @property
    def do_classifier_free_guidance(self) -> bool:
        # Stock would not evaluate the null stream at guidance_scale <= 1; DeGu needs it at any scale.
        return self._guided is not None or super().do_classifier_free_guidance

    # --- what each family says of its own models ---

    @property
    @abstractmethod
    def _denoiser(self) -> torch.nn.Module:
        """The module that is evaluated at every step."""

    @abstractmethod
    def _layers(self, denoiser: torch.nn.Module | None = None) -> list[CrossAttentionLayer] | list[JointAttentionLayer]:
        """Where the denoiser, by default the pipeline's, attends to text."""

    @abstractmethod
    def _text_encoders(self) -> dict[str, tuple]:
        """(text encoder, its tokenizer) by component name."""

    @abstractmethod
    def _encode_cae(self, embeddings: Mapping[str, torch.Tensor], sequence: Sequencer = cae_sequence) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The embeddings of each text encoder, (layers, tokens, dim), in their sequence, as the denoiser takes them: the hidden
        states (layers, length, hidden) and, in families that have it, the pooled embedding (1, dim)."""

    @abstractmethod
    def _encode_subject(self, cae: ContextAgnosticEmbeddings, sequences: Sequence[Sequencer], stock: dict[str, Any]) -> tuple[Condition, dict]:
        """A subject in each of several sequences: what comes in with the batch, a row for each of them, and what every layer sees
        instead, by its name, where it differs from layer to layer."""

    @abstractmethod
    def _fidelity_stream(self, contexts: dict[str, torch.Tensor], masking: Masking | None) -> LayerwiseStream:
        """The fidelity stream with these contexts, and with the layers that masks are read from."""

    @abstractmethod
    def _levels(self, config: TcamConfig) -> tuple[int, ...]:
        """The levels of the candidate maps, coarsest first. Raises ValueError for maps that this denoiser does not have."""

    @abstractmethod
    def _encode_options(self, stock: dict[str, Any]) -> dict[str, Any]:
        """What of stock's arguments its `encode_prompt` is to be told."""

    # --- and what follows from it ---

    def _unused_text_encoders(self) -> tuple[str, ...]:
        """Text encoders of the family that this pipeline does without."""
        return ()

    def _cae_dims(self) -> dict[str, int]:
        return {name: encoder.get_input_embeddings().weight.shape[1] for name, (encoder, _) in self._text_encoders().items()}

    def _check_cae(self, cae: ContextAgnosticEmbeddings, source: str) -> None:
        """Raises ValueError where the CAE is not for this denoiser and its tokenizers."""
        for _, tokenizer in self._text_encoders().values():
            if cae.num_tokens + 2 > tokenizer.model_max_length:
                raise ValueError(f"{source} has {cae.num_tokens} tokens; the tokenizer's {tokenizer.model_max_length} include start and end.")

    def _token_positions(self, config: TcamConfig) -> slice:
        """Where the token, or the subject's tokens, stand in `[SOT] V_1 ... V_N [EOT] [PAD] ...`."""
        tokens = self.active_cae.num_tokens
        return {"sot": slice(0, 1), "subject": slice(1, tokens + 1), "eot": slice(tokens + 1, tokens + 2)}[config.token]

    # --- the call ---

    def _decoupled_call(
        self,
        stock_call: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        *,
        fidelity_guidance_scale: float | None,
        host: Mapping[str, Any],
        host_guidance_scale: float | None,
        host_weights: str,
        host_denoiser: torch.nn.Module | None,
        subject_mask: Any,
    ):
        """Runs `stock_call` with the denoiser guided, or as it is where neither CAE nor host is in use.

        `host`: the host's prompts and embeddings, named as `encode_prompt` takes them; None where not given. `host_denoiser`
        evaluates its rows; None: the pipeline's.
        """
        self._last_masks = None
        bound = inspect.signature(stock_call).bind(*args, **kwargs)
        bound.apply_defaults()
        stock = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        fidelity_scale, host_scale = self._scales(fidelity_guidance_scale, host, host_guidance_scale)
        if subject_mask is not None and fidelity_scale == 0:
            raise ValueError(
                "`subject_mask` says where the fidelity stream acts, but that stream is off: load a CAE with "
                "`load_cae_embeddings` and leave `fidelity_guidance_scale` above 0."
            )
        weights = self._host_weights(host_weights, host_denoiser, host_scale)
        if fidelity_scale == 0 and host_scale == 0:
            return self._with_masks(stock_call(*args, **kwargs))
        with weights.left_out():
            prompts = _count(stock)
            images = prompts * (stock["num_images_per_prompt"] or 1)
            masking = self._masking(subject_mask, images, stock) if fidelity_scale != 0 else None
            fidelity = subject = host_condition = host_stream = None
            if fidelity_scale != 0:
                subject, contexts = self._encode_subject(self.active_cae, [cae_sequence], stock)
                fidelity = self._fidelity_stream(contexts, masking)
            if host_scale != 0:
                with weights.in_use(self._denoiser.forward):
                    host_condition, host_stream = self._encode_host(host, prompts, stock)
            self._guided = GuidedDenoiser(
                self,
                denoise=self._denoiser.forward,
                layers=self._layers(),
                fidelity=fidelity,
                subject=subject,
                host=host_condition,
                fidelity_scale=fidelity_scale,
                host_scale=host_scale,
                masking=masking,
                sliced=self._stream_slicing,
                host_weights=weights,
                host_stream=host_stream,
                host_layers=self._layers(host_denoiser),
            )
            try:
                with self._guided.installed(self._denoiser):
                    output = stock_call(*args, **kwargs)
                self._last_masks = self._guided.last_masks
            finally:
                self._guided = None
        return self._with_masks(output)

    def _with_masks(self, output):
        if isinstance(output, tuple):
            return output
        return self._output_class(**{field.name: getattr(output, field.name) for field in fields(output)}, subject_masks=self._last_masks)

    def _scales(self, fidelity_scale, host, host_scale) -> tuple[float, float]:
        """w_f and w_h with their defaults; 0 where there is nothing to guide with."""
        if self.active_cae is None:
            if fidelity_scale:
                raise ValueError(
                    f"`fidelity_guidance_scale` is {fidelity_scale}, but no CAE is active (loaded: {self.get_list_cae_adapters()}). "
                    "Load one with `load_cae_embeddings`, or choose one with `set_cae_adapter`."
                )
            fidelity_scale = 0.0
        elif fidelity_scale is None:
            fidelity_scale = self._degu_family.fidelity_guidance_scale
        if host["prompt"] is not None and host["prompt_embeds"] is not None:
            raise ValueError("Give either `host_prompt` or `host_prompt_embeds`, not both.")
        if "pooled_prompt_embeds" in host and (host["prompt_embeds"] is None) != (host["pooled_prompt_embeds"] is None):
            raise ValueError("`host_prompt_embeds` and `host_pooled_prompt_embeds` belong together: give both.")
        if host["prompt"] is None and host["prompt_embeds"] is None:
            if host_scale:
                raise ValueError(f"`host_guidance_scale` is {host_scale}, but there is no host: give `host_prompt` or `host_prompt_embeds`.")
            host_scale = 0.0
        elif host_scale is None:
            host_scale = self._degu_family.host_guidance_scale
        return fidelity_scale, host_scale

    def _masking(self, subject_mask, images: int, stock: dict[str, Any]) -> Masking | None:
        if subject_mask is not None:
            given = latent_masks(subject_mask, images, self._latent_size(stock))
            return Masking(self.tcam.start, given=given.to(self._execution_device))
        if not self._tcam_enabled:
            return None
        return Masking(self.tcam.start, self.tcam, self._token_positions(self.tcam), self._levels(self.tcam))

    def _latent_size(self, stock: dict[str, Any]) -> tuple[int, int]:
        if stock.get("latents") is not None:
            return tuple(stock["latents"].shape[-2:])
        if not stock["height"] or not stock["width"]:
            side = self._denoiser.config.sample_size
            return (side, side) if isinstance(side, int) else tuple(side)
        return stock["height"] // self.vae_scale_factor, stock["width"] // self.vae_scale_factor

    def _host_weights(self, scope: str, denoiser: torch.nn.Module | None, host_scale: float) -> HostWeights:
        """What of the model is the host's alone: the denoiser it comes with, and its adapters where `scope` is "host"."""
        if scope not in ("all", "host"):
            raise ValueError(f"`host_weights` is {scope!r}; it can be 'all' (its adapters act in all streams) or 'host' (in its own alone).")
        if host_scale == 0 and (denoiser is not None or scope == "host"):
            raise ValueError("Weights are given to the host alone, but there is no host stream: give `host_prompt`, and a `host_guidance_scale` that is not 0.")
        if denoiser is not None:
            own, theirs = self._denoiser, denoiser
            if type(theirs) is not type(own) or theirs.dtype != own.dtype or theirs.device.type != self._execution_device.type:
                raise ValueError(
                    f"The host's denoiser is a {type(theirs).__name__} of {theirs.dtype} on {theirs.device}; it has to be as the pipeline's: "
                    f"a {type(own).__name__} of {own.dtype} on {self._execution_device}."
                )
        encoders = [encoder for encoder, _ in self._text_encoders().values()] if scope == "host" else []
        return HostWeights(denoiser, (self._denoiser, *encoders) if scope == "host" else ())

    def _encode_host(self, host: Mapping[str, Any], prompts: int, stock: dict[str, Any]) -> tuple[Condition, LayerwiseStream | None]:
        """The host prompt as the pipeline itself encodes prompts, one row per image; or with the embeddings of a loaded adapter in
        it, and then what every layer sees."""
        repeats = stock["num_images_per_prompt"] or 1
        named = self._adapter_in(host)
        if named is not None:
            texts = _one_per_prompt("prompt", host["prompt"], prompts)
            distinct = list(dict.fromkeys(texts))  # each is a sequence per layer, so encoded once
            condition, contexts = self._encode_subject(self._cae_adapters[named], [prompt_with_embeddings(t, f"<{named}>") for t in distinct], stock)
            rows = [distinct.index(text) for text in texts for _ in range(repeats)]
            embeds, pooled = (None if x is None else x[rows] for x in (condition.embeds, condition.pooled))
            contexts = {name: context[rows] for name, context in contexts.items()}
            return Condition(embeds, pooled), LayerwiseStream(slice(0), contexts) if contexts else None
        encoded = self.encode_prompt(
            **{name: None if value is None else _one_per_prompt(name, value, prompts) for name, value in host.items()},
            device=self._execution_device,
            num_images_per_prompt=repeats,
            do_classifier_free_guidance=False,
            **self._encode_options(stock),
        )
        embeds, pooled = encoded[0], encoded[2] if len(encoded) > 2 else None
        if stock["prompt_embeds"] is not None and stock["prompt_embeds"].shape[1] != embeds.shape[1]:
            raise ValueError(
                f"The host prompt's embeddings have {embeds.shape[1]} tokens, `prompt_embeds` has "
                f"{stock['prompt_embeds'].shape[1]}; all streams are evaluated in one batch and need the same number."
            )
        return Condition(embeds, pooled), None

    def _adapter_in(self, host: Mapping[str, Any]) -> str | None:
        """The loaded adapter that the host's prompts name, as `<name>`."""
        texts = [host["prompt"]] if isinstance(host["prompt"], str) else host["prompt"] or []
        found = [[name for name in self._cae_adapters if f"<{name}>" in text] for text in texts]
        if not any(found):
            return None
        if any(names != found[0] or len(names) != 1 for names in found):
            raise ValueError(f"All host prompts have to name one and the same adapter; these name {found}.")
        others = [name for name, value in host.items() if name != "prompt" and value is not None]
        if others:
            raise ValueError(f"With the adapter {found[0][0]!r} in `host_prompt`, all text encoders read that prompt; leave {[f'host_{n}' for n in others]} out.")
        return found[0][0]


def _one_per_prompt(name: str, given, prompts: int):
    """A host's prompts or embeddings, repeated where there is one for all."""
    if isinstance(given, str):
        return [given] * prompts
    if isinstance(given, torch.Tensor) and len(given) == 1:
        return given.expand(prompts, *given.shape[1:])
    if len(given) != prompts:
        raise ValueError(f"`host_{name}` holds {len(given)} host prompts for {prompts} prompts: give one, or one per prompt.")
    return given


def _count(stock: dict[str, Any]) -> int:
    """How many prompts there are; 1 where stock's own checks are going to complain."""
    if isinstance(stock["prompt"], (list, tuple)):
        return len(stock["prompt"])
    return 1 if stock["prompt_embeds"] is None else len(stock["prompt_embeds"])
