"""Converts the mapper that NeTI's own code has saved to safetensors, without running what is pickled in it.

python -m degu.pipelines.hosts.convert_neti mapper-steps-1000.pt neti_mapper.safetensors
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import torch

from degu.pipelines.hosts.neti import NeTIMapper, mapper_for, save_mapper


class _Stub:
    """Takes the place of NeTI's own classes: keeps what they held, runs nothing of theirs."""


# The classes whose instances a mapper's file may hold.
_OWN = ("models.positional_encoding.NeTIPositionalEncoding", "models.positional_encoding.BasicEncoder", "utils.types.PESigmas")


def read(file: Path) -> dict:
    """What `torch.save` wrote to `file`.

    Raises:
        ValueError: not a file of that kind, or one that holds something else.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is not a file that `torch.save` wrote.")
    with torch.serialization.safe_globals([(_Stub, name) for name in _OWN]):
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if foreign:
            raise ValueError(f"{file} wants to load {sorted(foreign)}, which have no place in a NeTI mapper: it is not converted.")
        return torch.load(file, map_location="cpu", weights_only=True)


def converted(saved: dict) -> NeTIMapper:
    """The mapper that NeTI's `CheckpointHandler.save_mapper` saved as `state_dict`, `cfg` and `encoder`.

    Raises:
        ValueError: something missing, or a mapper without positional encoding.
    """
    missing = [name for name in ("state_dict", "cfg", "encoder") if name not in saved]
    if missing:
        raise ValueError(f"A NeTI mapper's file holds `state_dict`, `cfg` and `encoder`; {missing} are not there.")
    model = saved["cfg"]["model"]
    if not model["use_positional_encoding"]:
        raise ValueError("This mapper was trained without positional encoding, which is not supported.")
    # A buffer that NeTI keeps outside of the state dict.
    encoder = vars(saved["encoder"])
    frequencies = encoder["w"] if "w" in encoder else encoder["_parameters"]["w"]
    # NeTI's network begins with the input layer.
    names = {"input_layer": "input_layer", "net.1": "net.0", "net.2": "net.1", "net.4": "net.3", "net.5": "net.4", "output_layer.0": "output_layer"}
    state = {f"{ours}.{kind}": saved["state_dict"][f"{theirs}.{kind}"] for theirs, ours in names.items() for kind in ("weight", "bias")}
    state["frequencies"] = frequencies.detach()
    width, anchors = state["output_layer.weight"].shape[0], state["input_layer.weight"].shape[0]
    if model["target_norm"] is None:
        raise ValueError("This mapper was trained without a target norm, which is not supported.")
    bypass = bool(model["output_bypass"])
    config = {"dim": width // 2 if bypass else width, "layers": anchors // model["num_pe_time_anchors"], "norm": model["target_norm"], "bypass": bypass}
    mapper = mapper_for(state, **config)
    mapper.load_state_dict(state)
    return mapper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mapper", type=Path, help="mapper-steps-N.pt")
    parser.add_argument("output", type=Path, help="the safetensors file to write")
    args = parser.parse_args()
    save_mapper(converted(read(args.mapper)), args.output)


if __name__ == "__main__":
    main()
