"""Loading, choosing and unloading subjects."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Mapping

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from degu.pipelines.cae_file import DEFAULT_NAME, ContextAgnosticEmbeddings, parse_cae, read_cae


class CaeLoaderMixin:
    """Keeps the loaded subjects by adapter name. They are state of the pipeline, not components of it."""

    @property
    def _cae_adapters(self) -> dict[str, ContextAgnosticEmbeddings]:
        return self.__dict__.setdefault("_loaded_cae_adapters", {})

    def load_cae_embeddings(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
    ) -> None:
        """Loads a subject's CAE and makes it the active one. On any error nothing is changed.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder or Hub id with a `cae_embeddings.safetensors` in it, or
                a dict of tensors named as in such a file.
            adapter_name: the name for `set_cae_adapter`; by default `default_0`, `default_1`, ...
            weight_name: the file's name, where it is not `cae_embeddings.safetensors`.
            subfolder: folder in the folder or repository.
            revision, token, local_files_only, cache_dir, force_download: as elsewhere in diffusers, for Hub ids.

        Raises:
            ValueError: the file is damaged, no CAE, or does not fit this pipeline's model; or the name is in use.
            OSError: nothing is found there.
        """
        if adapter_name is None:
            adapter_name = next(name for i in range(len(self._cae_adapters) + 1) if (name := f"default_{i}") not in self._cae_adapters)
        elif adapter_name in self._cae_adapters:
            raise ValueError(
                f"The adapter name {adapter_name!r} is in use. Choose another `adapter_name`, or call "
                f"`unload_cae_embeddings({adapter_name!r})` first. Loaded: {self.get_list_cae_adapters()}."
            )
        source = pretrained_model_name_or_path_or_dict
        dims = self._cae_dims()
        if isinstance(source, Mapping):
            name = "the given dict"
            cae = parse_cae(source, self._degu_family.name, dims, self._optional_text_encoders)
        else:
            name = _find_file(
                os.fspath(source), weight_name, subfolder, revision=revision, token=token, cache_dir=cache_dir,
                local_files_only=bool(local_files_only), force_download=force_download,
            )  # fmt: skip
            cae = read_cae(name, self._degu_family.name, dims, self._optional_text_encoders)
        self._check_cae(cae, name)
        self._cae_adapters[adapter_name] = cae
        self._active_cae_adapter = adapter_name

    def unload_cae_embeddings(self, adapter_name: str | None = None) -> None:
        """Forgets a subject; None: all. After the active one is unloaded, none is active until one is set or loaded."""
        if adapter_name is None:
            self._cae_adapters.clear()
        else:
            self._require_adapter(adapter_name)
            del self._cae_adapters[adapter_name]
        if self.get_active_cae_adapter() not in self._cae_adapters:
            self._active_cae_adapter = None

    def set_cae_adapter(self, adapter_name: str) -> None:
        """Chooses the loaded subject that the next call uses."""
        self._require_adapter(adapter_name)
        self._active_cae_adapter = adapter_name

    def get_list_cae_adapters(self) -> list[str]:
        return list(self._cae_adapters)

    def get_active_cae_adapter(self) -> str | None:
        return self.__dict__.get("_active_cae_adapter")

    def _require_adapter(self, name: str) -> None:
        if name not in self._cae_adapters:
            raise ValueError(f"No CAE adapter is called {name!r}. Loaded: {self.get_list_cae_adapters()}.")


def _find_file(source: str, weight_name: str | None, subfolder: str | None, **hub_options) -> str:
    """The local path of a file, of a file in a folder, or of a file in a Hub repository (downloaded if need be)."""
    path = Path(source).expanduser()
    if path.is_file():
        return str(path)
    filename = weight_name or DEFAULT_NAME
    if path.is_dir():
        file = path / (subfolder or "") / filename
        if not file.is_file():
            raise OSError(f"The folder {source} has no file {file.relative_to(path)}. Name the file with `weight_name` and `subfolder`.")
        return str(file)
    if source.endswith(".safetensors") or source.startswith(("/", ".", "~")) or source.count("/") != 1:
        raise OSError(f"{source} does not exist. Give a CAE file, a folder with a {DEFAULT_NAME} in it, or a Hub id like `name/repository`.")
    try:
        return hf_hub_download(source, filename, subfolder=subfolder, **hub_options)
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, ConnectionError) as error:
        raise OSError(f"{source} is not a local file or folder, and {filename} could not be had from the Hub under that id: {error}") from error
