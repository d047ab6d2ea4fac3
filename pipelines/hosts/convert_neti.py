"""Converts the mapper that NeTI's own code has saved to safetensors, without running what is pickled in it.

python -m degu.pipelines.hosts.convert_neti mapper-steps-1000.pt neti_mapper.safetensors
"""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
from pathlib import Path

import torch

from degu.pipelines.hosts.neti import NeTIMapper, mapper_for, save_mapper


class _Stub:
    """Takes the place of NeTI's own classes: keeps what they held, runs nothing of theirs."""

    def __init__(self, *args, **kwargs) -> None:
        self.args = args

    def __setstate__(self, state) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


# What a mapper's file is made of, beside NeTI's own classes.
_ALLOWED = {
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    ("torch", "FloatStorage"), ("torch", "HalfStorage"), ("torch", "LongStorage"), ("__builtin__", "set"), ("builtins", "set"),
}  # fmt: skip
_OWN = ("models.", "training.", "utils.", "pathlib")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module.startswith(_OWN):
            return _Stub
        raise ValueError(f"The file wants to run {module}.{name}, which has no place in a NeTI mapper: it is not converted.")


def read(file: Path) -> dict:
    """What `torch.save` wrote to `file`.

    Raises:
        ValueError: not a file of that kind, or one that wants to run something else.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is not a file that `torch.save` wrote.")
    archive = torch._C.PyTorchFileReader(str(file))
    storages: dict[str, torch.UntypedStorage] = {}

    def persistent_load(saved) -> torch.storage.TypedStorage:
        _, kind, key, _, count = saved
        if key not in storages:
            storages[key] = archive.get_storage_from_record(f"data/{key}", count * kind.dtype.itemsize, torch.UntypedStorage)._typed_storage()._untyped_storage
        return torch.storage.TypedStorage(wrap_storage=storages[key], dtype=kind.dtype, _internal=True)

    unpickler = _Unpickler(io.BytesIO(archive.get_record("data.pkl")))
    unpickler.persistent_load = persistent_load
    return unpickler.load()


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
