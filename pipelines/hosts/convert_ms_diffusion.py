"""Converts MS-Diffusion's published ms_adapter.bin to safetensors, without running what is pickled in it.

python -m degu.pipelines.hosts.convert_ms_diffusion ms_adapter.bin ms_adapter.safetensors
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Mapping

import torch
from safetensors.torch import save_file

from degu.pipelines.hosts.ms_diffusion import FORMAT, FORMAT_VERSION

# MS-Diffusion's names in a layer of the resampler, and diffusers'.
_LAYER = {"0.norm1": "ln0", "0.norm2": "ln1", "0.to_q": "attn.to_q", "0.to_out": "attn.to_out.0", "1.0": "ff.0", "1.1": "ff.1.net.0.proj", "1.3": "ff.1.net.2"}
_UNUSED = "grounding_latents"  # for pictures without phrase and box, which are not offered here


def converted(saved: Mapping) -> dict[str, torch.Tensor]:
    """The tensors of `MSAdapter`, from those that MS-Diffusion saved as `image_proj`, `ms_adapter` and `dummy_image_tokens`.

    Raises:
        ValueError: something missing, or not known.
    """
    missing = [name for name in ("image_proj", "ms_adapter", "dummy_image_tokens") if name not in saved]
    if missing:
        raise ValueError(f"ms_adapter.bin holds `image_proj`, `ms_adapter` and `dummy_image_tokens`; {missing} are not there.")
    state = {"dummy_tokens": saved["dummy_image_tokens"].detach()}
    for name, tensor in saved["image_proj"].items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == _UNUSED:
            continue
        if layer is None:
            state[f"resampler.{name}"] = tensor
        elif layer[2] == "0.to_kv":
            state[f"resampler.layers.{layer[1]}.attn.to_k.weight"], state[f"resampler.layers.{layer[1]}.attn.to_v.weight"] = tensor.chunk(2)
        elif layer[2] in _LAYER:
            state[f"resampler.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"] = tensor
        else:
            raise ValueError(f"`image_proj` has {name!r}, which is not known; this is not an adapter that was trained with boxes and phrases.")
    for name, tensor in saved["ms_adapter"].items():
        number, kind = re.fullmatch(r"(\d+)\.(to_[kv])_ip\.weight", name).groups()
        state[f"{kind}.{number}.weight"] = tensor
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="ms_adapter.bin")
    parser.add_argument("output", type=Path, help="the safetensors file to write")
    args = parser.parse_args()
    saved = torch.load(args.adapter, map_location="cpu", weights_only=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in converted(saved).items()}, args.output, {"format": FORMAT, "format_version": FORMAT_VERSION})


if __name__ == "__main__":
    main()
