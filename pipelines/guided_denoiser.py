"""The denoiser as a pipeline sees it during a DeGu call: all streams evaluated, their guided mixture returned."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from degu.attention_processors import AttentionMaps, CrossAttentionLayer, LayerwiseStream, JointAttentionLayer
from degu.pipelines.guidance import decoupled_guidance
from degu.pipelines.hosts.host import Host, HostCondition, LoadedHost
from degu.pipelines.hosts.host_weights import HostWeights
from degu.pipelines.streams import Condition, map_batched
from degu.pipelines.subject_mask import subject_masks
from degu.pipelines.tcam import TcamConfig


@dataclass
class Masking:
    """How this call gets its subject masks: read at every step (`tcam`), or the user's own (`given`).

    Attributes:
        start: fraction of the steps before a mask acts.
        tcam: None where the mask is given.
        positions: of the token, or tokens, whose attention is read.
        levels: of the candidate maps, coarsest first.
        given: the user's mask at latent size, (n or 1, h, w) of 0 and 1.
    """

    start: float
    tcam: TcamConfig | None = None
    positions: slice | None = None
    levels: tuple[int, ...] = ()
    given: torch.Tensor | None = None


class GuidedDenoiser:
    """Stands in for the denoiser's `forward` for the length of one call.

    The pipeline evaluates its denoiser on the classifier-free-guidance batch [negative, positive] and computes
    `negative + g * (positive - negative)`. This object evaluates the streams [null, editability, fidelity, host] instead
    and returns their guided mixture in both halves, so that the pipeline's own line is the identity for any g and
    everything around it (schedulers, callbacks, image prompts) stays stock's.

    Args:
        pipe: the pipeline; its current `guidance_scale`, `guidance_rescale` and step count are read at every step, so that
            callbacks can change them.
        denoise: the denoiser's own `forward`, hooks included.
        layers: where it attends to text.
        fidelity: what goes into them for the fidelity stream, and what is read; None: no such stream.
        subject: the encoded CAE, for one image, as far as it comes in with the batch.
        host_condition: the encoded host prompt; None: no host stream.
        fidelity_scale, host_scale: w_f, w_h.
        masking: where the masks come from; None: no masks.
        sliced: evaluate the streams one after another instead of in one batch.
        host: whose prompt that is; None: of something that the pipeline has loaded and that acts in all streams.
        host_layers: where the denoiser of the host's rows attends to text; None: `layers`.
    """

    def __init__(
        self,
        pipe,
        denoise: Callable[..., Any],
        layers: list[CrossAttentionLayer] | list[JointAttentionLayer],
        fidelity: LayerwiseStream | None,
        subject: Condition | None,
        host_condition: HostCondition | None,
        fidelity_scale: float,
        host_scale: float,
        masking: Masking | None,
        sliced: bool,
        host: Host | None = None,
        host_layers: list[CrossAttentionLayer] | list[JointAttentionLayer] | None = None,
    ) -> None:
        self.pipe, self.denoise, self.layers = pipe, denoise, layers
        self._layer_at = {layer.level: layer for layer in layers}
        self.fidelity, self.subject = fidelity, subject
        self.host, self.host_condition = host or LoadedHost(HostWeights()), host_condition
        self.host_layers = layers if host_layers is None else host_layers
        self.fidelity_scale, self.host_scale = fidelity_scale, host_scale
        self.masking, self.sliced = masking, sliced
        self.step = 0
        self.masks: torch.Tensor | None = None  # of the current step, (n, h, w)
        self.guided: torch.Tensor | None = None  # the current step's mixture, and what the prompt's stream predicted
        self.prompted: torch.Tensor | None = None
        self.last_masks: torch.Tensor | None = None  # of the last step that had some

    @contextlib.contextmanager
    def installed(self, denoiser: torch.nn.Module) -> Iterator[None]:
        """Puts this object in the place of `denoiser.forward`; always puts the denoiser back as it was.

        The module stays the same object, so that offloading, device maps and everything that looks at it keep working.
        """
        own = denoiser.__dict__.get("forward")  # set where accelerate or diffusers have hooked the module
        denoiser.forward = self
        try:
            yield
        finally:
            # Model offloading re-hooks the module at the end of a call; then the place is no longer ours to restore.
            if denoiser.__dict__.get("forward") is self:
                del denoiser.__dict__["forward"]
                if own is not None:
                    denoiser.forward = own

    def __call__(self, *args, **kwargs):
        """Called as pipelines call their denoisers: a U-Net with (sample, timestep, encoder_hidden_states, ...), a transformer with
        everything by name and `hidden_states` for `sample`."""
        names = ("hidden_states" if "hidden_states" in kwargs else "sample", "timestep", "encoder_hidden_states")
        given = dict(zip(names, args)) | kwargs
        if given.pop("return_dict", True):
            raise ValueError("During a DeGu call the denoiser is evaluated with `return_dict=False`, as diffusers' pipelines do.")
        sample = given.pop(names[0])
        if given.get("skip_layers") is not None:
            return (self._without_layers(sample, **given),)
        guided = self._guided(sample, **given)
        return (torch.cat([guided, guided]),)

    def _guided(self, sample: torch.Tensor, timestep, encoder_hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        step, self.step = self.step, self.step + 1
        n = len(sample) // 2
        if len(encoder_hidden_states) == n:
            # A callback has switched classifier-free guidance off (as `SDCFGCutoffCallback` does): plain prediction.
            given = map_batched({"timestep": timestep, **kwargs}, 2 * n, lambda x: x[n:])
            self.masks = None
            self.guided = self.prompted = self.denoise(sample[:n], encoder_hidden_states=encoder_hidden_states, return_dict=False, **given)[0]
            return self.guided

        scales = {"editability": self.pipe.guidance_scale}
        if self.fidelity is not None:
            scales["fidelity"] = self.fidelity_scale
        if self.host_condition is not None:
            scales["host"] = self.host_scale
        streams = ["null", *(name for name, scale in scales.items() if scale != 0)]
        masking = self.masking
        if masking is not None and ("fidelity" not in streams or step < masking.start * self.pipe.num_timesteps):
            masking = None
        maps = None
        if masking is not None and masking.tcam is not None:
            maps = AttentionMaps(masking.positions)

        predictions = self._evaluate(streams, n, maps, sample, encoder_hidden_states, {"timestep": timestep, **kwargs})
        editability_region = fidelity_region = self.masks = None
        if masking is not None:
            self.masks, found = self._masks(masking, maps, sample)
            self.last_masks = self.masks
            # Where no subject is found both streams act everywhere; the mask is empty there, so 1 - M already says so.
            inside = self.masks.to(sample.dtype)[:, None]
            editability_region = 1 - inside
            fidelity_region = torch.where(found[:, None, None, None], inside, 1)
        guided = decoupled_guidance(
            **predictions,
            **{f"{name}_scale": scale for name, scale in scales.items()},
            editability_region=editability_region,
            fidelity_region=fidelity_region,
        )
        rescale = getattr(self.pipe, "guidance_rescale", 0.0)  # SD 3 has none
        if rescale > 0 and len(streams) > 1:
            # Here, because stock's own line would compare the mixture with itself. Its reference is the prompt's stream.
            text = next(predictions[name] for name in ("editability", "host", "fidelity") if name in predictions)
            guided = rescale_noise_cfg(guided, text, guidance_rescale=rescale)
        self.guided, self.prompted = guided, predictions.get("editability")
        return guided

    def _without_layers(self, sample: torch.Tensor, **kwargs) -> torch.Tensor:
        """SD 3's skip-layer guidance evaluates the prompt once more with layers left out and adds `scale * (text - this)`. The
        pipeline's `text` is the mixture here, so it gets what makes the difference the prompt's stream's own."""
        if self.prompted is None:  # w_e is 0: the prompt does not guide
            return self.guided
        return self.guided - (self.prompted - self.denoise(sample, return_dict=False, **kwargs)[0])

    def _evaluate(self, streams, n, maps, sample, encoder_hidden_states, kwargs) -> dict[str, torch.Tensor]:
        """Each stream's prediction, (n, channels, h, w): in one batch, or one after another where sliced; apart from the others, the
        host's where it has weights of its own."""
        negative, positive = slice(0, n), slice(n, 2 * n)
        # The prompt's image prompts belong to the host where there is one, else to the editability stream.
        carrier = "host" if "host" in streams else "editability"
        groups = [[name] for name in streams] if self.sliced else [streams]
        apart = self.host.apart or self.host.denoiser is not None
        if apart and "host" in streams and not self.sliced:
            groups = [[name for name in streams if name != "host"], ["host"]]
        predictions = {}
        for names in groups:
            halves = [positive if name == carrier else negative for name in names]
            texts = {"null": encoder_hidden_states[negative], "editability": encoder_hidden_states[positive]}
            for name, condition in (("fidelity", self.subject), ("host", self.host_condition)):
                if condition is not None and condition.embeds is not None:
                    texts[name] = condition.embeds.expand(n, -1, -1)
                else:  # replaced layer by layer
                    texts[name] = texts["null"]
            gathered = map_batched(kwargs, 2 * n, lambda x: torch.cat([x[half] for half in halves]))
            if "text_embeds" in (kwargs.get("added_cond_kwargs") or ()):
                added = kwargs["added_cond_kwargs"]
                gathered["added_cond_kwargs"]["text_embeds"] = self._pooled(names, n, added["text_embeds"])
                gathered["added_cond_kwargs"]["time_ids"] = _sizes(names, n, added["time_ids"])
            if "pooled_projections" in kwargs:
                gathered["pooled_projections"] = self._pooled(names, n, kwargs["pooled_projections"])
            if gathered.get("timestep_cond") is not None and len(gathered["timestep_cond"]) == n:
                gathered["timestep_cond"] = gathered["timestep_cond"].repeat(len(names), 1)
            with contextlib.ExitStack() as stack:
                denoise = self.denoise
                if "host" in names:
                    stack.enter_context(self.host.in_use())
                    denoise = denoise if self.host.denoiser is None else self.host.denoiser.forward
                if "fidelity" in names:
                    first = names.index("fidelity") * n
                    self.fidelity.rows, self.fidelity.maps = slice(first, first + n), maps
                    stack.enter_context(self.fidelity.attached(self.layers))
                if "host" in names and self.host_condition.stream_at is not None:
                    first = names.index("host") * n
                    stream = self.host_condition.stream_at(kwargs["timestep"])
                    stream.rows = slice(first, first + n)
                    stack.enter_context(stream.attached(self.host_layers))
                predicted = denoise(
                    torch.cat([sample[:n]] * len(names)),
                    encoder_hidden_states=torch.cat([texts[name] for name in names]),
                    return_dict=False,
                    **gathered,
                )[0]
            predictions.update(zip(names, predicted.chunk(len(names))))
        return predictions

    def _pooled(self, names: list[str], n: int, stock: torch.Tensor) -> torch.Tensor:
        """Each stream's own pooled text, where `stock` (2n, dim) has the negative's and the prompt's."""
        pooled = {
            "null": stock[:n],
            "editability": stock[n:],
            "fidelity": self.subject and self.subject.pooled.expand(n, -1),
            "host": self.host_condition and self.host_condition.pooled,
        }
        return torch.cat([pooled[name] for name in names])

    def _masks(self, masking: Masking, maps: AttentionMaps | None, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n, size = len(sample) // 2, tuple(sample.shape[-2:])
        if masking.given is not None:
            return masking.given.expand(n, *size), torch.ones(n, dtype=torch.bool, device=sample.device)
        sizes = {level: self._layer_at[level].map_size(size) for level in masking.levels}
        return subject_masks(
            [maps.mean(level).view(n, *sizes[level]) for level in masking.levels],
            size,
            invert=masking.tcam.invert,
            kernel_size=masking.tcam.kernel_size,
            sigma=masking.tcam.sigma,
        )


def _sizes(names: list[str], n: int, stock: torch.Tensor) -> torch.Tensor:
    """SDXL's sizes: the null stream has the negative ones, all others the prompt's.

    A call has one size for all its images. Stock's rows are not [negative] * n + [positive] * n, but first and last are.
    """
    return torch.cat([(stock[:1] if name == "null" else stock[-1:]).expand(n, -1) for name in names])
