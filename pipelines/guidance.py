"""The Decoupled Guidance Mixer: how the predictions of the streams become one."""

from __future__ import annotations

import torch


def decoupled_guidance(
    null: torch.Tensor,
    editability: torch.Tensor | None = None,
    fidelity: torch.Tensor | None = None,
    host: torch.Tensor | None = None,
    *,
    editability_scale: float = 0.0,
    fidelity_scale: float = 0.0,
    host_scale: float = 0.0,
    editability_region: torch.Tensor | None = None,
    fidelity_region: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Mixes the streams' predictions (Eq. 5 and 7 of the paper; Eq. J and K with a host).

        null + w_h (host - null) + w_e R_e (editability - null) + w_f R_f (fidelity - null)

    The formula is affine in the predictions, so it holds for noise, velocity and flow alike.

    Args:
        null: prediction under the negative prompt, (n, channels, h, w).
        editability, fidelity, host: predictions of the other streams, same shape; None where a stream is off.
        editability_scale, fidelity_scale, host_scale: w_e, w_f, w_h.
        editability_region, fidelity_region: where the two act, (n, 1, h, w) of 0 and 1: 1 - M and M while masking is
            active (Eq. 7), None for everywhere (Eq. 5). The host acts everywhere.

    Returns:
        The guided prediction, shape and dtype of `null`.
    """
    guided = null
    for prediction, scale, region in (
        (host, host_scale, None),
        (editability, editability_scale, editability_region),
        (fidelity, fidelity_scale, fidelity_region),
    ):
        if prediction is not None:
            direction = prediction - null
            # Without a region in stock's own order of operations, which makes a lone stream equal stock bit for bit.
            guided = guided + scale * direction if region is None else guided.addcmul(region, direction, value=scale)
    return guided
