"""The CAE sequence `[SOT] V_1 ... V_N [EOT] [PAD] ...` and its way through a text encoder that stays as it is."""

from __future__ import annotations

from typing import Sequence

import torch


def cae_sequence(tokenizer, num_tokens: int) -> tuple[torch.Tensor, slice]:
    """Token ids (length,) of the sequence, with a placeholder for each V, and where the V stand.

    Raises:
        ValueError: more tokens than fit into the text encoder's context.
    """
    length = tokenizer.model_max_length
    if num_tokens + 2 > length:
        raise ValueError(f"{num_tokens} CAE tokens do not fit: the text encoder reads {length} tokens, two of them start and end.")
    specials = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    placeholder = next(i for i in range(len(specials) + 1) if i not in specials)  # any ordinary token; never seen
    ids = [tokenizer.bos_token_id, *[placeholder] * num_tokens, tokenizer.eos_token_id]
    return torch.tensor(ids + [tokenizer.pad_token_id] * (length - len(ids))), slice(1, num_tokens + 1)


def encode_cae(text_encoder, tokenizer, embeddings: torch.Tensor) -> torch.Tensor:
    """Encodes every layer's embeddings on their own, in a sequence with no word in it; differentiable in them.

    Args:
        embeddings: (layers, tokens, dim), any float type; cast to the encoder's. Evaluated on their device, where an
            offloaded encoder's hooks bring its weights.

    Returns:
        The last hidden states (layers, length, hidden).
    """
    ids, positions = cae_sequence(tokenizer, embeddings.shape[1])
    return encode_with_rows(text_encoder, tokenizer, ids, positions, embeddings)[0]


def encode_cae_xl(encoders: Sequence[tuple], embeddings: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode_cae` as SDXL reads its text: both encoders' penultimate hidden states side by side, and the second's pooled one.

    Args:
        encoders: (text encoder, tokenizer), twice; the second encoder has a projection.
        embeddings: (layers, tokens, dim) for each of them.

    Returns:
        The hidden states (layers, length, hidden) and the pooled embedding (1, projected). The denoiser takes that only once,
        so it is the mean over the layers' sequences.
    """
    outputs = []
    for (text_encoder, tokenizer), rows in zip(encoders, embeddings, strict=True):
        ids, positions = cae_sequence(tokenizer, rows.shape[1])
        outputs.append(encode_with_rows(text_encoder, tokenizer, ids, positions, rows, output_hidden_states=True))
    return torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs[-1].text_embeds.mean(0, keepdim=True)


def encode_with_rows(text_encoder, tokenizer, ids: torch.Tensor, positions: slice, rows: torch.Tensor, **options):
    """Encodes the sequence `ids` (length,) once for each of `rows` (n, tokens, dim), which stand at `positions`.

    Neither tokenizer nor embedding matrix is touched: for this one evaluation a hook puts the rows where the
    placeholders' embeddings would be. Returns the text encoder's output; `options` go to it.
    """

    def insert(module, args, output):  # output (n, length, dim)
        return torch.cat([output[:, : positions.start], rows.to(output.device, output.dtype), output[:, positions.stop :]], 1)

    hook = text_encoder.get_input_embeddings().register_forward_hook(insert)
    try:
        ids = ids.expand(len(rows), -1).to(rows.device)
        mask = (ids != tokenizer.pad_token_id).long() if getattr(text_encoder.config, "use_attention_mask", False) else None
        return text_encoder(ids, attention_mask=mask, **options)
    finally:
        hook.remove()
