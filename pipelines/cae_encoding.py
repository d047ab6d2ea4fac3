"""The CAE sequence `[SOT] V_1 ... V_N [EOT] [PAD] ...` and its way through a text encoder that stays as it is."""

from __future__ import annotations

from typing import Callable, Sequence

import torch
import torch.nn.functional as F

# From a tokenizer, how many tokens, and the length (None: the tokenizer's) to the ids and where the embeddings stand in them.
Sequencer = Callable[..., tuple[torch.Tensor, slice]]


def cae_sequence(tokenizer, num_tokens: int, length: int | None = None) -> tuple[torch.Tensor, slice]:
    """Token ids (length,) of the sequence, with a placeholder for each V, and where the V stand.

    `length` is by default the tokenizer's `model_max_length`. T5's sequences have no start.

    Raises:
        ValueError: more tokens than fit.
    """
    length = length or tokenizer.model_max_length
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if len(start) + num_tokens + 1 > length:
        raise ValueError(f"{num_tokens} CAE tokens do not fit: the text encoder reads {length} tokens, start and end included.")
    specials = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    placeholder = next(i for i in range(len(specials) + 1) if i not in specials)  # any ordinary token; never seen
    ids = [*start, *[placeholder] * num_tokens, tokenizer.eos_token_id]
    return torch.tensor(ids + [tokenizer.pad_token_id] * (length - len(ids))), slice(len(start), len(start) + num_tokens)


def prompt_with_embeddings(prompt: str, placeholder: str, noun: str = "") -> Sequencer:
    """As `cae_sequence`, with the embeddings in the place of `placeholder` in `prompt`; what does not fit is cut off at the end.

    A text encoder without embeddings (`num_tokens` 0) reads `noun` there.

    Raises:
        ValueError: the embeddings themselves do not fit.
    """
    before, after = prompt.split(placeholder, 1)

    def sequence(tokenizer, num_tokens: int, length: int | None = None) -> tuple[torch.Tensor, slice]:
        length = length or tokenizer.model_max_length
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        start += tokenizer(before, add_special_tokens=False).input_ids
        if len(start) + num_tokens + 1 > length:
            raise ValueError(f"{placeholder!r} with its {num_tokens} tokens does not fit into the {length} that the text encoder reads of {prompt!r}.")
        placeholders, there = cae_sequence(tokenizer, num_tokens)
        positions = slice(len(start), len(start) + num_tokens)
        subject = placeholders[there].tolist() or tokenizer(noun, add_special_tokens=False).input_ids
        ids = [*start, *subject, *tokenizer(after, add_special_tokens=False).input_ids][: length - 1]
        ids += [tokenizer.eos_token_id]
        return torch.tensor(ids + [tokenizer.pad_token_id] * (length - len(ids))), positions

    return sequence


def encode_cae(text_encoder, tokenizer, embeddings: torch.Tensor, sequence: Sequencer = cae_sequence) -> torch.Tensor:
    """Encodes every layer's embeddings on their own, in a sequence with no word in it; differentiable in them.

    Args:
        embeddings: (layers, tokens, dim), any float type; cast to the encoder's. Evaluated on their device, where an
            offloaded encoder's hooks bring its weights.
        sequence: what the embeddings stand in.

    Returns:
        The last hidden states (layers, length, hidden).
    """
    ids, positions = sequence(tokenizer, embeddings.shape[1])
    return encode_with_rows(text_encoder, tokenizer, ids, positions, embeddings)[0]


def _encode_clips(clips: Sequence[tuple], embeddings: Sequence[torch.Tensor], sequence: Sequencer) -> tuple[torch.Tensor, list]:
    """The penultimate hidden states of several CLIPs side by side, (layers, length, hidden), and each one's whole output."""
    outputs = []
    for (text_encoder, tokenizer), rows in zip(clips, embeddings, strict=True):
        ids, positions = sequence(tokenizer, rows.shape[1])
        outputs.append(encode_with_rows(text_encoder, tokenizer, ids, positions, rows, output_hidden_states=True))
    return torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs


def encode_cae_xl(
    encoders: Sequence[tuple], embeddings: Sequence[torch.Tensor], sequence: Sequencer = cae_sequence
) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode_cae` as SDXL reads its text: both encoders' penultimate hidden states side by side, and the second's pooled one.

    Args:
        encoders: (text encoder, tokenizer), twice; the second encoder has a projection.
        embeddings: (layers, tokens, dim) for each of them.

    Returns:
        The hidden states (layers, length, hidden) and the pooled embedding (1, projected). The denoiser takes that only once,
        so it is the mean over the layers' sequences.
    """
    hidden, outputs = _encode_clips(encoders, embeddings, sequence)
    return hidden, outputs[-1].text_embeds.mean(0, keepdim=True)


def encode_cae_3(
    clips: Sequence[tuple],
    embeddings: Sequence[torch.Tensor],
    t5: tuple | None,
    t5_embeddings: torch.Tensor | None,
    t5_length: int,
    dim: int,
    sequence: Sequencer = cae_sequence,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode_cae` as SD 3 reads its text: the two CLIPs' penultimate states side by side, widened with zeros, then T5's.

    Args:
        clips: (text encoder with a projection, tokenizer), twice.
        embeddings: (1, tokens, dim) for each of them.
        t5, t5_embeddings: the same for T5. Where either is None, zeros take its place, as stock has it without T5.
        t5_length: how long T5's part is, stock's `max_sequence_length`.
        dim: the width of the sequence.

    Returns:
        The sequence (1, length, dim) and both CLIPs' pooled embeddings side by side (1, projected).
    """
    clip, outputs = _encode_clips(clips, embeddings, sequence)
    if t5 is None or t5_embeddings is None:
        last = clip.new_zeros(1, t5_length, dim)
    else:
        text_encoder, tokenizer = t5
        ids, positions = sequence(tokenizer, t5_embeddings.shape[1], t5_length)
        # Its encoder looks tokens up in an embedding matrix of its own, which shares the weights of the model's.
        table = text_encoder.encoder.get_input_embeddings()
        last = encode_with_rows(text_encoder, tokenizer, ids, positions, t5_embeddings, table=table)[0]
    hidden = torch.cat([F.pad(clip, (0, dim - clip.shape[-1])), last.to(clip.device, clip.dtype)], 1)
    return hidden, torch.cat([output.text_embeds for output in outputs], -1)


def encode_with_rows(text_encoder, tokenizer, ids: torch.Tensor, positions: slice, rows: torch.Tensor, table=None, **options):
    """Encodes the sequence `ids` (length,) once for each of `rows` (n, tokens, dim), which stand at `positions`.

    Neither tokenizer nor embedding matrix is touched: for this one evaluation a hook puts the rows where the
    placeholders' embeddings would be. Returns the text encoder's output; `options` go to it. `table`: the module that
    embeds the tokens, where it is not the encoder's `get_input_embeddings()`.
    """

    def insert(module, args, output):  # output (n, length, dim)
        return torch.cat([output[:, : positions.start], rows.to(output.device, output.dtype), output[:, positions.stop :]], 1)

    hook = (table or text_encoder.get_input_embeddings()).register_forward_hook(insert)
    try:
        ids = ids.expand(len(rows), -1).to(rows.device)
        mask = (ids != tokenizer.pad_token_id).long() if getattr(text_encoder.config, "use_attention_mask", False) else None
        return text_encoder(ids, attention_mask=mask, **options)
    finally:
        hook.remove()
