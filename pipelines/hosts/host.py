"""What a personalization method gives to have a stream of its own; and the host that is whatever the pipeline has loaded."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Callable, Mapping

import torch

from degu.attention_processors import LayerwiseStream
from degu.pipelines.cae_encoding import prompt_with_embeddings
from degu.pipelines.cae_file import ContextAgnosticEmbeddings
from degu.pipelines.hosts.host_weights import HostWeights
from degu.pipelines.streams import Condition


@dataclass(frozen=True)
class HostCondition(Condition):
    """What the host's rows are told, one for each image of the call.

    `stream_at(timestep)` is what every layer sees at this step, where that differs from layer to layer; None: `embeds`.
    """

    stream_at: Callable[[torch.Tensor], LayerwiseStream] | None = None


class Host(ABC):
    """A personalization method in a stream of its own (Eq. J). A new one is a subclass of this, given to the call as `host=`.

    Attributes:
        apart: whether its rows cannot be in one batch with the others, because `in_use` changes the model.
        denoiser: of its own, which evaluates its rows, apart from the others; None: the pipeline's.
    """

    apart = False
    denoiser: torch.nn.Module | None = None

    @abstractmethod
    def encode(self, pipe, texts: Mapping[str, Any], stock: Mapping[str, Any]) -> HostCondition:
        """The host prompts as the host encodes them.

        Args:
            pipe: the pipeline that is being called.
            texts: what was given as `host_prompt`, `host_prompt_2`, ..., named as `pipe.encode_prompt` names them: a list with one
                text for each prompt of the call, or embeddings (prompts, tokens, dim); None where not given.
            stock: the call's other arguments, defaults filled in.
        """

    def left_out(self) -> contextlib.AbstractContextManager[None]:
        """Entered for the length of the call: while it lasts, the model is the bare backbone that the CAE was trained on."""
        return contextlib.nullcontext()

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Entered inside `left_out`, around `encode` and around every evaluation of a batch with the host's rows in it."""
        return contextlib.nullcontext()


class LoadedHost(Host):
    """What diffusers itself, or `load_cae_embeddings`, has loaded into the pipeline: tokens, adapters, processors.

    Args:
        weights: what of the model is the host's alone.
        denoiser: a fine-tuned one that evaluates the host's rows; None: the pipeline's.
    """

    def __init__(self, weights: HostWeights, denoiser: torch.nn.Module | None = None) -> None:
        self.weights, self.denoiser, self.apart = weights, denoiser, bool(weights)

    def left_out(self) -> contextlib.AbstractContextManager[None]:
        return self.weights.switched(on=False)

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        return self.weights.switched(on=True)

    def encode(self, pipe, texts: Mapping[str, Any], stock: Mapping[str, Any]) -> HostCondition:
        """The host prompts as the pipeline itself encodes prompts; or with the embeddings of a loaded adapter in them."""
        repeats = stock["num_images_per_prompt"] or 1
        named = _adapter_in(texts, pipe.get_list_cae_adapters())
        if named is not None:
            distinct = list(dict.fromkeys(texts["prompt"]))  # each is a sequence per layer, so encoded once
            cae = pipe._cae_adapters[named]
            noun = cae.metadata.get("class_noun", "")
            sequences = [prompt_with_embeddings(text, f"<{named}>", noun) for text in distinct]
            condition, contexts = pipe._encode_subject(_with_empty_rows(cae, pipe._cae_dims()), sequences, stock)
            rows = [distinct.index(text) for text in texts["prompt"] for _ in range(repeats)]
            embeds, pooled = (None if x is None else x[rows] for x in (condition.embeds, condition.pooled))
            if not contexts:
                return HostCondition(embeds, pooled)
            stream = LayerwiseStream(slice(0), {name: context[rows] for name, context in contexts.items()})
            return HostCondition(embeds, pooled, lambda timestep: stream)
        encoded = pipe.encode_prompt(
            **texts,
            device=pipe._execution_device,
            num_images_per_prompt=repeats,
            do_classifier_free_guidance=False,
            **pipe._encode_options(stock),
        )
        embeds, pooled = encoded[0], encoded[2] if len(encoded) > 2 else None
        if stock["prompt_embeds"] is not None and stock["prompt_embeds"].shape[1] != embeds.shape[1]:
            raise ValueError(
                f"The host prompt's embeddings have {embeds.shape[1]} tokens, `prompt_embeds` has "
                f"{stock['prompt_embeds'].shape[1]}; all streams are evaluated in one batch and need the same number."
            )
        return HostCondition(embeds, pooled)


def texts_of(given: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    """A call's host prompts and embeddings, with one entry for each of its `prompts`; where there is one, it is for all.

    Raises:
        ValueError: another number.
    """

    def spread(name: str, value):
        if value is None:
            return None
        if isinstance(value, str):
            return [value] * prompts
        if isinstance(value, torch.Tensor) and len(value) == 1:
            return value.expand(prompts, *value.shape[1:])
        if len(value) != prompts:
            raise ValueError(f"`host_{name}` holds {len(value)} host prompts for {prompts} prompts: give one, or one per prompt.")
        return value

    return {name: spread(name, value) for name, value in given.items()}


def _with_empty_rows(cae: ContextAgnosticEmbeddings, dims: Mapping[str, int]) -> ContextAgnosticEmbeddings:
    """`cae` with no tokens for those of the pipeline's text encoders that it has no rows for: they read the rest of the prompt."""
    empty = {name: torch.empty(1, 0, dim) for name, dim in dims.items() if name not in cae.embeddings}
    return replace(cae, embeddings={**cae.embeddings, **empty})


def _adapter_in(texts: Mapping[str, Any], adapters: list[str]) -> str | None:
    """The loaded adapter that the host's prompts name, as `<name>`."""
    found = [[name for name in adapters if f"<{name}>" in text] for text in texts["prompt"] or []]
    if not any(found):
        return None
    if any(names != found[0] or len(names) != 1 for names in found):
        raise ValueError(f"All host prompts have to name one and the same adapter; these name {found}.")
    others = [name for name, value in texts.items() if name != "prompt" and value is not None]
    if others:
        raise ValueError(f"With the adapter {found[0][0]!r} in `host_prompt`, all text encoders read that prompt; leave {[f'host_{n}' for n in others]} out.")
    return found[0][0]
