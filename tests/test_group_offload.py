"""Group offloading, on all families: weights in groups that come when they are needed, by hooks that have to survive a call."""

from __future__ import annotations

import diffusers
import pytest
import torch
from conftest import FAMILIES, latents_of, with_subject
from packaging.version import Version

WITHOUT_ACCELERATOR = Version(diffusers.__version__) < Version("0.42") and torch.accelerator.current_accelerator() is None


@pytest.mark.skipif(WITHOUT_ACCELERATOR, reason="before diffusers 0.42, group offloading itself fails without an accelerator")
@pytest.mark.parametrize("offload", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}], ids=["leaf", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_group_offload(family, offload):
    pipe, cpu = with_subject(family), torch.device("cpu")
    expected = latents_of(pipe)
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, **offload)
    hooks = {name: list(module._diffusers_hook.hooks) for name, module in pipe._denoiser.named_modules() if hasattr(module, "_diffusers_hook")}
    assert hooks
    for _ in range(2):
        assert torch.equal(latents_of(pipe), expected)
    assert hooks == {name: list(module._diffusers_hook.hooks) for name, module in pipe._denoiser.named_modules() if hasattr(module, "_diffusers_hook")}
