"""NeTI: its tokens are other ones at every timestep and in every layer, and the values see another text than the keys."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import DIM, as_dict, close, latents_of, noise, random_cae, with_subject
from safetensors.torch import load_file, save_file

from degu.pipelines.hosts import NeTI
from degu.pipelines.hosts.neti import NeTIMapper, load_mapper, save_mapper

SCALES = dict(guidance_scale=3.0, fidelity_guidance_scale=2.0, host_guidance_scale=2.0)


def new_mapper(pipe, bypass: bool = True) -> NeTIMapper:
    torch.manual_seed(5)
    return NeTIMapper(DIM, len(pipe._layers()), norm=4.0, bypass=bypass, frequencies=32, hidden=16)


def reference_mapping(state: dict, t: float, layer: int, norm: float) -> torch.Tensor:
    """As the paper has it, for one timestep and layer: (dim,) or (2 * dim,)."""
    phase = state["frequencies"] @ torch.tensor([t, float(layer)])
    x = torch.cat([phase.sin(), phase.cos()])
    x = state["input_layer.weight"] @ (x / x.norm()) + state["input_layer.bias"]
    for linear, scale in (("net.0", "net.1"), ("net.3", "net.4")):
        x = state[f"{linear}.weight"] @ x + state[f"{linear}.bias"]
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * state[f"{scale}.weight"] + state[f"{scale}.bias"]
        x = torch.where(x > 0, x, 0.01 * x)
    x = state["output_layer.weight"] @ x + state["output_layer.bias"]
    return x / x.norm() * norm


class RecordingLinear:
    """Remembers what a linear layer was given."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.inputs = []
        self.hook = module.register_forward_hook(lambda module, args, output: self.inputs.append(args[0].detach().clone()))


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
def test_every_step_and_layer_sees_its_own_token(bypass, sliced):
    """What keys and values are made of, against the text encoder with the reference's token written into its matrix."""
    pipe = with_subject("sd")
    pipe.disable_tcam()  # which reads keys of its own
    mapper = new_mapper(pipe, bypass)
    if sliced:
        pipe.enable_stream_slicing()
    keys, values = ([RecordingLinear(getattr(layer.module, name)) for layer in pipe._layers()] for name in ("to_k", "to_v"))
    host = NeTI(mapper, "<my-dog>")
    made = latents_of(pipe, host=host, host_prompt="a <my-dog> in the snow", **SCALES)
    assert torch.isfinite(made).all()
    ids = pipe.tokenizer("a dog in the snow", padding="max_length", return_tensors="pt").input_ids
    there = int((ids[0] == pipe.tokenizer.convert_tokens_to_ids("dog</w>")).nonzero())
    embedding, norm = pipe.text_encoder.get_input_embeddings().weight, getattr(pipe.text_encoder, "text_model", pipe.text_encoder).final_layer_norm
    kept = embedding[ids[0, there]].clone()
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        for index in range(len(keys)):
            output = reference_mapping(mapper.state_dict(), float(timestep), index, 4.0)
            before = []
            hook = norm.register_forward_pre_hook(lambda module, args: before.append(args[0]))
            with torch.no_grad():
                embedding[ids[0, there]] = output[:DIM]
                expected = pipe.text_encoder(ids)[0]
                embedding[ids[0, there]] = kept
                hook.remove()
                expected_values = expected.clone()
                if bypass:
                    state = before[0][0, there]
                    expected_values[0, there] = norm(state + 0.2 * output[DIM:] / output[DIM:].norm() * state.norm())
            calls = len(keys[index].inputs) // 3
            close(keys[index].inputs[(step + 1) * calls - 1][-1:], expected)
            close(values[index].inputs[(step + 1) * calls - 1][-1:], expected_values)


def test_a_mapper_that_says_always_the_same_is_a_textual_inversion():
    pipe = with_subject("sd")
    mapper = new_mapper(pipe, bypass=False)
    with torch.no_grad():
        mapper.output_layer.weight.zero_()
    vector = F.normalize(mapper.output_layer.bias, dim=0) * 4.0
    pipe.load_textual_inversion(vector.detach()[None].clone(), token="<inverted>")
    expected = latents_of(pipe, host_prompt="a <inverted> in the snow", **SCALES)
    close(latents_of(pipe, host=NeTI(mapper, "<my-dog>"), host_prompt="a <my-dog> in the snow", **SCALES), expected)


def test_batches_are_single_calls():
    pipe = with_subject("sd")
    host, prompts = NeTI(new_mapper(pipe), "<s>"), ["a <s> in the snow", "a red <s>"]
    shared = dict(num_inference_steps=2, output_type="latent", host=host, **SCALES)
    together = pipe(["a dog", "a cat"], host_prompt=prompts, num_images_per_prompt=2, latents=noise(4), **shared).images
    for i, prompt in enumerate(["a dog", "a dog", "a cat", "a cat"]):
        close(pipe(prompt, host_prompt=prompts[i // 2], latents=noise(4)[i : i + 1], **shared).images[0], together[i])


def test_fewer_hidden_units_are_another_token():
    mapper = new_mapper(with_subject("sd"))
    times, layers = torch.tensor([10, 10]), torch.tensor([0, 0])
    full, half = mapper(times, layers)[0], mapper(times, layers, torch.tensor([16, 8]))[0]
    assert torch.equal(full[0], half[0]) and not torch.allclose(full[1], half[1])
    with torch.no_grad():
        mapper.output_layer.weight[:, 8:] = 0
    close(mapper(times, layers)[0][1].detach(), mapper(times, layers, torch.tensor([16, 8]))[0][1].detach())


def test_the_model_is_as_before():
    pipe = with_subject("sd")
    expected, hooks = latents_of(pipe), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (*pipe.unet.modules(), *pipe.text_encoder.modules())]

    def stop(pipe, i, t, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents_of(pipe, host=NeTI(new_mapper(pipe)), host_prompt="a <subject>", callback_on_step_end=stop)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (*pipe.unet.modules(), *pipe.text_encoder.modules())]
    assert torch.equal(latents_of(pipe), expected)


def test_files(tmp_path):
    pipe = with_subject("sd")
    mapper = new_mapper(pipe)
    save_mapper(mapper, tmp_path / "neti_mapper.safetensors")
    shared = dict(host_prompt="a <s> in the snow", **SCALES)
    expected = latents_of(pipe, host=NeTI(mapper, "<s>"), **shared)
    assert torch.equal(latents_of(pipe, host=NeTI.from_file(tmp_path, token="<s>"), **shared), expected)
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_mapper(tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a readable safetensors file .* Convert"):
        load_mapper(tmp_path / "broken.safetensors")
    save_file(as_dict(random_cae(pipe)), tmp_path / "cae.safetensors", {"format": "degu-cae"})
    with pytest.raises(ValueError, match="not a NeTI mapper file: its metadata has format 'degu-cae'"):
        load_mapper(tmp_path / "cae.safetensors")


def test_errors():
    pipe = with_subject("sd")
    with pytest.raises(ValueError, match="every host prompt has '<subject>' in it, once"):
        latents_of(pipe, host=NeTI(new_mapper(pipe)), host_prompt="a dog")
    with pytest.raises(ValueError, match="is for embeddings of 8 and 3 layers; the pipeline has 32 and 16"):
        latents_of(pipe, host=NeTI(NeTIMapper(8, 3, 1.0)), host_prompt="a <subject>")
    with pytest.raises(ValueError, match="this is a StableDiffusionXLDeGuPipeline"):
        latents_of(with_subject("sdxl"), host=NeTI(new_mapper(pipe)), host_prompt="a <subject>")
    with pytest.raises(ValueError, match="no host stream: give `host_prompt`"):
        latents_of(pipe, host=NeTI(new_mapper(pipe)))
    with pytest.raises(ValueError, match="leave `host_weights`"):
        latents_of(pipe, host=NeTI(new_mapper(pipe)), host_prompt="a <subject>", host_weights="host")
    with pytest.raises(ValueError, match="`host` is a str"):
        latents_of(pipe, host="neti", host_prompt="a <subject>")


# --- files of NeTI's own code ---


@pytest.fixture
def netis_modules(monkeypatch):
    """Modules with the names of NeTI's, so that what is pickled here names its classes as its own files do."""
    modules = {name: types.ModuleType(name) for name in ("models", "models.positional_encoding", "utils", "utils.types")}
    encoding = type("NeTIPositionalEncoding", (torch.nn.Module,), {"__module__": "models.positional_encoding"})
    sigmas = type("PESigmas", (), {"__module__": "utils.types"})
    modules["models.positional_encoding"].NeTIPositionalEncoding, modules["utils.types"].PESigmas = encoding, sigmas
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return encoding


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("kind", ["attribute", "parameter"])
def test_conversion(tmp_path, netis_modules, bypass, kind):
    """`frequencies` is a plain attribute of a file that was saved on a GPU, a parameter of one that was not."""
    mapper = new_mapper(with_subject("sd"), bypass)
    state = mapper.state_dict()
    names = {"input_layer": ("input_layer", "net.0"), "net.0": ("net.1",), "net.1": ("net.2",), "net.3": ("net.4",), "net.4": ("net.5",), "output_layer": ("output_layer.0",)}
    theirs = {f"{t}.{k}": state[f"{ours}.{k}"] for ours, all_theirs in names.items() for t in all_theirs for k in ("weight", "bias")}
    encoder = netis_modules()
    encoder.sigma_t, encoder.w = 0.03, state["frequencies"].clone() if kind == "attribute" else torch.nn.Parameter(state["frequencies"].clone())
    model = {"use_positional_encoding": True, "num_pe_time_anchors": 10, "output_bypass": bypass, "target_norm": 4.0}
    torch.save({"state_dict": theirs, "cfg": {"model": model, "log": {"exp_name": "dog"}}, "encoder": encoder}, tmp_path / "mapper-steps-1000.pt")
    command = [sys.executable, "-m", "degu.pipelines.hosts.convert_neti", str(tmp_path / "mapper-steps-1000.pt"), str(tmp_path / "neti.safetensors")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    converted = load_mapper(tmp_path / "neti.safetensors")
    assert converted.bypass == bypass and converted.layers == mapper.layers and converted.norm == 4.0
    assert all(torch.equal(tensor, load_file(tmp_path / "neti.safetensors")[name]) for name, tensor in state.items())


def test_what_else_is_pickled_is_not_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": {}, "cfg": {}, "encoder": Malicious()}, tmp_path / "mapper.pt")
    command = [sys.executable, "-m", "degu.pipelines.hosts.convert_neti", str(tmp_path / "mapper.pt"), str(tmp_path / "neti.safetensors")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0 and "wants to load ['io.open']" in run.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "neti.safetensors").exists()
