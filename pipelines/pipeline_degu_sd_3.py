"""Decoupled Guidance for Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import torch
from diffusers import StableDiffusion3Pipeline

from degu.attention_processors import JointAttentionLayer, JointFidelityStream, joint_attention_layers
from degu.pipelines.cae_encoding import Sequencer, cae_sequence, encode_cae_3
from degu.pipelines.cae_file import ContextAgnosticEmbeddings
from degu.pipelines.degu_mixin import DeGuMixin, extends
from degu.pipelines.families import SD3
from degu.pipelines.guided_denoiser import Masking
from degu.pipelines.hosts.host import Host
from degu.pipelines.output import StableDiffusion3DeGuPipelineOutput
from degu.pipelines.streams import Condition
from degu.pipelines.tcam import TcamConfig


class StableDiffusion3DeGuPipeline(DeGuMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with a stream of its own for a subject learned as context-agnostic embeddings (CAE).

    Text flows through all blocks of the transformer, so a CAE has one set of embeddings per text encoder, without layers.

    Example:

        >>> pipe = StableDiffusion3DeGuPipeline.from_pretrained(base)
        >>> pipe.load_cae_embeddings("dog.safetensors")
        >>> image = pipe("a dog in the snow").images[0]
    """

    _degu_family = SD3
    _output_class = StableDiffusion3DeGuPipelineOutput
    _optional_text_encoders = ("text_encoder_3",)

    @property
    def _denoiser(self) -> torch.nn.Module:
        return self.transformer

    def _text_encoders(self) -> dict[str, tuple]:
        encoders = {"text_encoder": (self.text_encoder, self.tokenizer), "text_encoder_2": (self.text_encoder_2, self.tokenizer_2)}
        missing = [name for name, (encoder, _) in encoders.items() if encoder is None]
        if missing:
            raise ValueError(f"A CAE is encoded by the text encoders of SD 3, but this pipeline was loaded without {missing}.")
        return encoders if self.text_encoder_3 is None else encoders | {"text_encoder_3": (self.text_encoder_3, self.tokenizer_3)}

    def _layers(self, denoiser: torch.nn.Module | None = None) -> list[JointAttentionLayer]:
        return joint_attention_layers(self.transformer if denoiser is None else denoiser)

    def _check_cae(self, cae: ContextAgnosticEmbeddings, source: str) -> None:
        sets = next(iter(cae.embeddings.values())).shape[0]
        if sets != 1:
            raise ValueError(f"{source} has embeddings for {sets} layers; SD 3 has one set for the whole transformer.")
        super()._check_cae(cae, source)

    def _blocks(self, config: TcamConfig) -> tuple[int, ...]:
        """The blocks whose attention is averaged; by default the middle third."""
        depth = len(self.transformer.transformer_blocks)
        if config.layers is None:
            return tuple(range(depth // 3, depth - depth // 3))
        unknown = [index for index in config.layers if index not in range(depth)]
        if unknown:
            raise ValueError(f"`layers` {unknown} are no blocks of this transformer; it has 0 to {depth - 1}.")
        return config.layers

    def _levels(self, config: TcamConfig) -> tuple[int, ...]:
        if config.resolutions is not None:
            raise ValueError("`resolutions` chooses maps of a U-Net; this denoiser is an MMDiT, whose blocks `layers` chooses.")
        self._blocks(config)
        return (self._layers()[0].level,)

    def _token_positions(self, config: TcamConfig) -> slice:
        """In `[SOT] V_1 ... V_N [EOT] ...` of the CLIPs followed by `V_1 ... V_N </s> ...` of T5: the terminal token is T5's, or
        the CLIPs' where T5 does not read the CAE."""
        t5_reads_it = self.text_encoder_3 is not None and "text_encoder_3" in self.active_cae.embeddings
        if not t5_reads_it or config.token == "sot":
            return super()._token_positions(config)
        start, tokens = self.tokenizer_max_length, self.active_cae.num_tokens
        return slice(start, start + tokens) if config.token == "subject" else slice(start + tokens, start + tokens + 1)

    def _encode_options(self, stock: dict[str, Any]) -> dict[str, Any]:
        lora_scale = (stock["joint_attention_kwargs"] or {}).get("scale")
        return {"clip_skip": stock["clip_skip"], "lora_scale": lora_scale, "max_sequence_length": stock["max_sequence_length"]}

    def _encode_subject(
        self, cae: ContextAgnosticEmbeddings, sequences: Sequence[Sequencer], stock: dict[str, Any]
    ) -> tuple[Condition, dict[str, torch.Tensor]]:
        given, device, dtype = stock["prompt_embeds"], self._execution_device, self.transformer.dtype
        length = stock["max_sequence_length"] if given is None else given.shape[1] - self.tokenizer_max_length
        embeddings = {name: rows.to(device) for name, rows in cae.embeddings.items()}
        encoded = [self._encode_cae(embeddings, sequence, length) for sequence in sequences]
        embeds, pooled = (torch.cat(parts).to(device, dtype) for parts in zip(*encoded))
        return Condition(embeds, pooled), {}

    def _fidelity_stream(self, contexts: dict[str, torch.Tensor], masking: Masking | None) -> JointFidelityStream:
        blocks = self._blocks(masking.tcam) if masking is not None and masking.tcam is not None else ()
        captured = frozenset(layer.name for layer in self._layers() if layer.index in blocks)
        return JointFidelityStream(slice(0), contexts, None, captured)

    def _encode_cae(
        self, embeddings: Mapping[str, torch.Tensor], sequence: Sequencer = cae_sequence, t5_length: int = 256
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Without embeddings for T5, as they are trained with `--without_t5`, T5's part is zeros, as where there is no T5."""
        clips = self._text_encoders()
        t5 = clips.pop("text_encoder_3", None)
        rows, dim = [embeddings[name] for name in clips], self.transformer.config.joint_attention_dim
        return encode_cae_3(list(clips.values()), rows, t5, embeddings.get("text_encoder_3"), t5_length, dim, sequence)

    @extends(StableDiffusion3Pipeline.__call__)
    @torch.no_grad()
    def __call__(
        self,
        *args,
        fidelity_guidance_scale: float | None = None,
        host_prompt: str | list[str] | None = None,
        host_prompt_2: str | list[str] | None = None,
        host_prompt_3: str | list[str] | None = None,
        host_prompt_embeds: torch.Tensor | None = None,
        host_pooled_prompt_embeds: torch.Tensor | None = None,
        host_guidance_scale: float | None = None,
        host: Host | None = None,
        host_weights: str = "all",
        host_transformer: torch.nn.Module | None = None,
        subject_mask: Any = None,
        **kwargs,
    ):
        """Takes all that `StableDiffusion3Pipeline` takes, with the same meaning, and in addition:

        Args:
            guidance_scale: w_e, how strongly the plain prompt guides.
            fidelity_guidance_scale: w_f, how strongly the loaded subject guides; by default the family's
                (`degu.pipelines.families.SD3`). 0 turns the fidelity stream off.
            host_prompt, host_prompt_2, host_prompt_3: prompt of a host method that the pipeline has loaded, for the first and
                (by default the same) the other text encoders; one, or one per prompt. Turns the host stream on; image
                prompts (IP-Adapter) then go to it alone.
            host_prompt_embeds, host_pooled_prompt_embeds: instead, (prompts or 1, tokens, dim) and (prompts or 1, dim).
            host_guidance_scale: w_h; by default the family's.
            host: a method that diffusers cannot load (`degu.pipelines.hosts.host.Host`); None: what the pipeline has loaded.
            host_weights: where loaded LoRA adapters act: "all" streams, or the "host" stream alone, which is then evaluated apart
                from the others.
            host_transformer: a fine-tuned denoiser (DreamBooth) that evaluates the host stream instead of the pipeline's.
            subject_mask: the user's own mask instead of the one read from attention: PIL, array or tensor, (h, w) or
                (images, h, w), 1 or white on the subject.

        Returns:
            `StableDiffusion3DeGuPipelineOutput`, or stock's tuple with `return_dict=False`.

        Raises:
            ValueError: a scale without the CAE or host prompt it belongs to; a mask or host prompts of the wrong shape.
        """
        texts = {
            "prompt": host_prompt,
            "prompt_2": host_prompt_2,
            "prompt_3": host_prompt_3,
            "prompt_embeds": host_prompt_embeds,
            "pooled_prompt_embeds": host_pooled_prompt_embeds,
        }
        return self._decoupled_call(
            super().__call__,
            args,
            kwargs,
            fidelity_guidance_scale=fidelity_guidance_scale,
            host=host,
            host_texts=texts,
            host_guidance_scale=host_guidance_scale,
            host_weights=host_weights,
            host_denoiser=host_transformer,
            subject_mask=subject_mask,
        )
