"""The formula, against the paper's, term by term."""

import pytest
import torch

from degu.pipelines.guidance import decoupled_guidance

N, E, F, H = torch.randn(4, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
M = (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).double()


def test_without_mask_is_eq_5_and_j():
    mixed = decoupled_guidance(N, E, F, H, editability_scale=7.5, fidelity_scale=2.0, host_scale=3.0)
    torch.testing.assert_close(mixed, N + 3.0 * (H - N) + 7.5 * (E - N) + 2.0 * (F - N))


def test_with_mask_each_stream_acts_on_its_side():
    mixed = decoupled_guidance(N, E, F, H, editability_scale=7.5, fidelity_scale=2.0, host_scale=3.0, editability_region=1 - M, fidelity_region=M)
    inside, outside = M.expand_as(N) == 1, M.expand_as(N) == 0
    torch.testing.assert_close(mixed[inside], (N + 3.0 * (H - N) + 2.0 * (F - N))[inside])
    torch.testing.assert_close(mixed[outside], (N + 3.0 * (H - N) + 7.5 * (E - N))[outside])


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.0, 7.5])
def test_one_stream_is_classifier_free_guidance(scale):
    torch.testing.assert_close(decoupled_guidance(N, E, editability_scale=scale), N + scale * (E - N), rtol=0, atol=0)


def test_keeps_the_dtype():
    half = [x.half() for x in (N, E, F)]
    assert decoupled_guidance(*half, editability_scale=7.5, fidelity_scale=2.0, fidelity_region=M.half()).dtype == torch.float16
