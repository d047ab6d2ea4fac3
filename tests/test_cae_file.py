"""The file format, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import DIM, TOKENS, as_dict, noise, random_cae
from full_size import unet_2_1
from safetensors import safe_open
from safetensors.torch import save_file

from degu.attention_processors import cross_attention_layers
from degu.pipelines.cae_encoding import encode_cae
from degu.pipelines.cae_file import ContextAgnosticEmbeddings, read_cae, save_cae

DIMS = {"text_encoder": DIM}


@pytest.fixture
def file(stock, tmp_path):
    save_cae(random_cae(stock), tmp_path / "cae_embeddings.safetensors", "sd")
    return tmp_path / "cae_embeddings.safetensors"


def rewritten(file, tensors=None, **metadata):
    """The file with some tensors or metadata replaced; None drops an entry."""
    with safe_open(file, "pt") as opened:
        kept = {name: opened.get_tensor(name) for name in opened.keys()}
        merged = {**opened.metadata(), **metadata}
    save_file(tensors if tensors is not None else kept, file, metadata={k: v for k, v in merged.items() if v is not None})
    return file


def test_round_trip(stock, file):
    cae, written = read_cae(file, "sd", DIMS), random_cae(stock)
    assert torch.equal(cae.embeddings["text_encoder"], written.embeddings["text_encoder"])
    assert cae.layer_names == written.layer_names and cae.metadata["class_noun"] == "dog"
    assert [p.name for p in file.parent.iterdir()] == [file.name], "no temporary file is left"


def test_the_papers_storage(tmp_path):
    """SD 2.1's own layers, five tokens: 320 KB and a header."""
    with torch.device("meta"):
        unet = unet_2_1()
    names = tuple(layer.name for layer in cross_attention_layers(unet))
    rows = torch.zeros(len(names), 5, unet.config.cross_attention_dim)
    save_cae(ContextAgnosticEmbeddings({"text_encoder": rows}, names), tmp_path / "cae.safetensors", "sd")
    assert 320 * 1024 < (tmp_path / "cae.safetensors").stat().st_size < 324 * 1024


def test_layers_go_by_name(stock, pipe, file):
    """A file whose layers stand in another order gives every layer its own rows all the same."""
    names = [layer.name for layer in cross_attention_layers(stock.unet)]
    tensor = random_cae(stock).embeddings["text_encoder"]
    pipe.load_cae_embeddings(file, adapter_name="a")
    rewritten(file, {"cae.text_encoder": tensor.flip(0).contiguous()}, layer_names=json.dumps(names[::-1]))
    pipe.load_cae_embeddings(file, adapter_name="b")
    made = [pipe("a dog", num_inference_steps=1, latents=noise(), output_type="latent").images for name in "ab" if pipe.set_cae_adapter(name) is None]
    assert torch.equal(*made)


BAD = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "damaged"),
    "not safetensors": (lambda f: f.write_bytes(b"\x80\x04pickle" * 50), "damaged"),
    "empty": (lambda f: f.write_bytes(b""), "damaged"),
    "no format": (lambda f: rewritten(f, format=None), "not a CAE file"),
    "later version": (lambda f: rewritten(f, format_version="2"), "version"),
    "wrong family": (lambda f: rewritten(f, family="sdxl"), "sdxl"),
    "missing key": (lambda f: rewritten(f, {"other": torch.zeros(1)}), "expected exactly"),
    "extra encoder": (lambda f: rewritten(f, {"cae.text_encoder": torch.zeros(16, 3, DIM), "cae.text_encoder_2": torch.zeros(16, 3, DIM)}), "expected exactly"),
    "wrong dimension": (lambda f: rewritten(f, {"cae.text_encoder": torch.zeros(16, 3, 48)}), "48 dimensions"),
    "wrong layer count": (lambda f: rewritten(f, {"cae.text_encoder": torch.zeros(7, 3, DIM)}, layer_names=json.dumps(list("abcdefg"))), "7 layers"),
    "other layers": (lambda f: rewritten(f, layer_names=json.dumps([f"x{i}" for i in range(16)])), "other layers"),
    "names do not match": (lambda f: rewritten(f, layer_names=json.dumps(["a"])), "names 1 layers"),
    "names are no list": (lambda f: rewritten(f, layer_names="["), "JSON"),
    "wrong token count": (lambda f: rewritten(f, num_tokens="9"), "9 tokens"),
    "two dimensions": (lambda f: rewritten(f, {"cae.text_encoder": torch.zeros(3, DIM)}), "layers, tokens, dim"),
    "integers": (lambda f: rewritten(f, {"cae.text_encoder": torch.zeros(16, 3, DIM, dtype=torch.int32)}), "float"),
    "NaN": (lambda f: rewritten(f, {"cae.text_encoder": torch.full((16, 3, DIM), float("nan"))}), "NaN"),
    "infinity": (lambda f: rewritten(f, {"cae.text_encoder": torch.full((16, 3, DIM), float("inf"))}), "infinity"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_and_nothing_changed(pipe, file, name):
    pipe.load_cae_embeddings(as_dict(random_cae(pipe)), adapter_name="dog")
    spoil, says = BAD[name]
    spoil(file)
    with pytest.raises(ValueError, match=says) as error:
        pipe.load_cae_embeddings(file, adapter_name="new")
    assert str(file) in str(error.value)
    assert pipe.get_list_cae_adapters() == ["dog"] and pipe.get_active_cae_adapter() == "dog"


def test_names_in_use_are_refused(pipe, file):
    pipe.load_cae_embeddings(file, adapter_name="dog")
    before = pipe.active_cae
    with pytest.raises(ValueError, match="in use"):
        pipe.load_cae_embeddings(file, adapter_name="dog")
    assert pipe.active_cae is before


# --- where it is loaded from ---


def test_places(pipe, file):
    folder = file.parent
    (folder / "sub").mkdir()
    (folder / "sub" / "dog.safetensors").write_bytes(file.read_bytes())
    pipe.load_cae_embeddings(str(file))
    pipe.load_cae_embeddings(folder)
    pipe.load_cae_embeddings(folder, subfolder="sub", weight_name="dog.safetensors")
    pipe.load_cae_embeddings(as_dict(random_cae(pipe)))
    assert pipe.get_list_cae_adapters() == ["default_0", "default_1", "default_2", "default_3"]
    assert pipe.get_active_cae_adapter() == "default_3"


def test_from_the_hubs_cache_without_a_network(pipe, file, tmp_path):
    """The layout that huggingface_hub keeps downloads in."""
    commit, cache = "0" * 40, tmp_path / "hub"
    repository = cache / "models--someone--my-dog"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / file.name).write_bytes(file.read_bytes())
    pipe.load_cae_embeddings("someone/my-dog", cache_dir=cache, local_files_only=True)
    with pytest.raises(OSError, match="someone/my-cat"):
        pipe.load_cae_embeddings("someone/my-cat", cache_dir=cache, local_files_only=True)
    assert len(pipe.get_list_cae_adapters()) == 1


@pytest.mark.parametrize("path", ["nowhere.safetensors", "/nowhere/dog", "./dog", "~/no/dog", "dog"])
def test_paths_that_do_not_exist(pipe, path):
    with pytest.raises(OSError, match="does not exist"):
        pipe.load_cae_embeddings(path)


def test_a_folder_without_the_file(pipe, tmp_path):
    with pytest.raises(OSError, match="cae_embeddings.safetensors"):
        pipe.load_cae_embeddings(tmp_path)


# --- choosing ---


def test_adapters(pipe, file):
    for name in ("dog", "cat"):
        pipe.load_cae_embeddings(file, adapter_name=name)
    assert pipe.get_active_cae_adapter() == "cat"
    pipe.set_cae_adapter("dog")
    for wrong in (pipe.set_cae_adapter, pipe.unload_cae_embeddings):
        with pytest.raises(ValueError, match="'fish'.*dog"):
            wrong("fish")
    pipe.unload_cae_embeddings("dog")
    assert pipe.get_list_cae_adapters() == ["cat"] and pipe.get_active_cae_adapter() is None
    pipe.set_cae_adapter("cat")
    pipe.unload_cae_embeddings()
    assert pipe.get_list_cae_adapters() == [] and pipe.get_active_cae_adapter() is None


def test_load_unload_load_is_load(pipe, file):
    state = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    tokens = len(pipe.tokenizer)

    def latents():
        return pipe("a dog", num_inference_steps=1, latents=noise(), output_type="latent").images

    pipe.load_cae_embeddings(file, adapter_name="dog")
    first = latents()
    pipe.unload_cae_embeddings()
    assert not torch.equal(latents(), first)
    pipe.load_cae_embeddings(file, adapter_name="dog")
    assert torch.equal(latents(), first)
    assert len(pipe.tokenizer) == tokens
    assert all(torch.equal(value, state[name]) for name, value in pipe.text_encoder.state_dict().items())


def test_encoding_is_that_of_real_tokens(stock):
    """Rows that are copies of a word's embedding encode as that word does."""
    ids = stock.tokenizer("dog dog dog", padding="max_length", return_tensors="pt").input_ids
    word = stock.text_encoder.get_input_embeddings().weight[ids[0, 1]].detach()
    with torch.no_grad():
        expected, made = stock.text_encoder(ids)[0], encode_cae(stock.text_encoder, stock.tokenizer, word.expand(2, TOKENS, -1))
    torch.testing.assert_close(made, expected.expand(2, -1, -1))
