"""What the pipelines of all families share: the settings, and the frame around stock's `__call__`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import fields, replace
from typing import Any, Callable, Mapping, Sequence

import torch

from degu.attention_processors import CrossAttentionLayer, LayerwiseStream, JointAttentionLayer
from degu.pipelines.cae_encoding import Sequencer, cae_sequence
from degu.pipelines.cae_file import ContextAgnosticEmbeddings
from degu.pipelines.cae_loader import CaeLoaderMixin
from degu.pipelines.families import Family
from degu.pipelines.guided_denoiser import GuidedDenoiser, Masking
from degu.pipelines.hosts.host import Host, LoadedHost, texts_of
from degu.pipelines.hosts.host_weights import HostWeights
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
    _optional_text_encoders: tuple[str, ...] = ()  # that a pipeline of the family, or a CAE, may do without
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
        host: Host | None,
        host_texts: Mapping[str, Any],
        host_guidance_scale: float | None,
        host_weights: str,
        host_denoiser: torch.nn.Module | None,
        subject_mask: Any,
    ):
        """Runs `stock_call` with the denoiser guided, or as it is where neither CAE nor host is in use.

        `host_texts`: the host's prompts and embeddings, named as `encode_prompt` takes them; None where not given.
        """
        self._last_masks = None
        bound = inspect.signature(stock_call).bind(*args, **kwargs)
        bound.apply_defaults()
        stock = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        fidelity_scale, host_scale = self._scales(fidelity_guidance_scale, host_texts, host_guidance_scale)
        if subject_mask is not None and fidelity_scale == 0:
            raise ValueError(
                "`subject_mask` says where the fidelity stream acts, but that stream is off: load a CAE with "
                "`load_cae_embeddings` and leave `fidelity_guidance_scale` above 0."
            )
        host = self._loaded_host(host_weights, host_denoiser, host, host_scale)
        if fidelity_scale == 0 and host_scale == 0:
            return self._with_masks(stock_call(*args, **kwargs))
        with host.left_out():
            prompts = _count(stock)
            images = prompts * (stock["num_images_per_prompt"] or 1)
            masking = self._masking(subject_mask, images, stock) if fidelity_scale != 0 else None
            fidelity = subject = host_condition = None
            if fidelity_scale != 0:
                subject, contexts = self._encode_subject(self.active_cae, [cae_sequence], stock)
                fidelity = self._fidelity_stream(contexts, masking)
            if host_scale != 0:
                texts = texts_of(host_texts, prompts)
                with host.in_use():
                    host_condition = host.encode(self, texts, stock)
            self._guided = GuidedDenoiser(
                self,
                denoise=self._denoiser.forward,
                layers=self._layers(),
                fidelity=fidelity,
                subject=subject,
                host_condition=host_condition,
                fidelity_scale=fidelity_scale,
                host_scale=host_scale,
                masking=masking,
                sliced=self._stream_slicing,
                host=host,
                host_layers=self._layers(host.denoiser),
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

    def _scales(self, fidelity_scale, texts, host_scale) -> tuple[float, float]:
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
        if texts["prompt"] is not None and texts["prompt_embeds"] is not None:
            raise ValueError("Give either `host_prompt` or `host_prompt_embeds`, not both.")
        if "pooled_prompt_embeds" in texts and (texts["prompt_embeds"] is None) != (texts["pooled_prompt_embeds"] is None):
            raise ValueError("`host_prompt_embeds` and `host_pooled_prompt_embeds` belong together: give both.")
        if texts["prompt"] is None and texts["prompt_embeds"] is None:
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

    def _loaded_host(self, scope: str, denoiser: torch.nn.Module | None, host: Host | None, host_scale: float) -> Host:
        """The host that was given to the call; or what the pipeline has loaded: with the denoiser that came with it, and with its
        adapters and processors to itself where `scope` is "host"."""
        if scope not in ("all", "host"):
            raise ValueError(f"`host_weights` is {scope!r}; it can be 'all' (its weights act in all streams) or 'host' (in its own alone).")
        if host_scale == 0 and (denoiser is not None or host is not None or scope == "host"):
            raise ValueError(
                "`host`, `host_weights` and the host's denoiser are for the host stream, but there is no host stream: give `host_prompt`, "
                "and a `host_guidance_scale` that is not 0."
            )
        if host is not None:
            if denoiser is not None or scope == "host":
                raise ValueError("`host` says itself what of the model is its own: leave `host_weights` and the host's denoiser out.")
            if not isinstance(host, Host):
                raise ValueError(f"`host` is a {type(host).__name__}; it has to be a `degu.pipelines.hosts.host.Host`.")
            return host
        if denoiser is not None:
            own, theirs = self._denoiser, denoiser
            if type(theirs) is not type(own) or theirs.dtype != own.dtype or theirs.device.type != self._execution_device.type:
                raise ValueError(
                    f"The host's denoiser is a {type(theirs).__name__} of {theirs.dtype} on {theirs.device}; it has to be as the pipeline's: "
                    f"a {type(own).__name__} of {own.dtype} on {self._execution_device}."
                )
        encoders = [encoder for encoder, _ in self._text_encoders().values()] if scope == "host" else []
        return LoadedHost(HostWeights(self._denoiser, *encoders) if scope == "host" else HostWeights(), denoiser)


def _count(stock: dict[str, Any]) -> int:
    """How many prompts there are; 1 where stock's own checks are going to complain."""
    if isinstance(stock["prompt"], (list, tuple)):
        return len(stock["prompt"])
    return 1 if stock["prompt_embeds"] is None else len(stock["prompt_embeds"])
