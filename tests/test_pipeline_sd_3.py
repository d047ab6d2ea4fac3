"""What is SD 3's own: three text encoders, joint attention, flow matching. What the families share is tested with SD."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import DIM, TOKENS, as_dict, load_as_custom_pipeline, load_random_ip_adapter_3, noise, random_cae, tiny_stock_3
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from full_size import transformer_3_5_large, transformer_3_5_medium
from reference import reference_latents_3

from degu.attention_processors import JointFidelityStream, joint_attention_layers
from degu.pipelines import StableDiffusion3DeGuPipeline
from degu.pipelines.cae_encoding import prompt_with_embeddings
from degu.pipelines.cae_file import save_cae
from degu.pipelines.families import SD3
from degu.pipelines.guided_denoiser import GuidedDenoiser, Masking
from degu.pipelines.streams import Condition

PROMPTS = ["a dog in the snow", "a cat on the beach", "a mug at night"]
CLIP, T5 = 32, 16  # lengths of the two parts of the text sequence


@pytest.fixture
def stock() -> StableDiffusion3Pipeline:
    return tiny_stock_3()


def with_cae(stock) -> StableDiffusion3DeGuPipeline:
    pipe = StableDiffusion3DeGuPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_cae_embeddings(as_dict(random_cae(pipe)))
    return pipe


@pytest.fixture
def loaded(stock) -> StableDiffusion3DeGuPipeline:
    """Shares its weights with `stock`."""
    return with_cae(stock)


def latents_of(pipe, prompt=PROMPTS[0], steps=3, **kwargs):
    kwargs = {"latents": noise(), "max_sequence_length": T5} | kwargs
    return pipe(prompt, num_inference_steps=steps, output_type="latent", **kwargs).images


@pytest.mark.parametrize("kind", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler])
@pytest.mark.parametrize("options", [{}, {"skip_guidance_layers": [1, 2], "skip_layer_guidance_stop": 0.7}])
def test_off_is_stock_bit_for_bit(stock, loaded, kind, options):
    for pipe in (stock, loaded):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    expected = latents_of(stock, **options)
    assert torch.equal(latents_of(loaded, fidelity_guidance_scale=0.0, **options), expected)
    loaded.unload_cae_embeddings()
    assert torch.equal(latents_of(loaded, **options), expected)


def test_signature_is_stocks_then_ours():
    names = list(inspect.signature(StableDiffusion3DeGuPipeline.__call__).parameters)
    stock = list(inspect.signature(StableDiffusion3Pipeline.__call__).parameters)
    assert names == stock + [
        "fidelity_guidance_scale", "host_prompt", "host_prompt_2", "host_prompt_3", "host_prompt_embeds", "host_pooled_prompt_embeds",
        "host_guidance_scale", "host", "host_weights", "host_transformer", "subject_mask",
    ]  # fmt: skip


@pytest.mark.parametrize("t5, t5_rows", [(True, True), (False, False), (True, False)], ids=["t5", "no t5", "a cae trained without t5"])
@pytest.mark.parametrize("host", [None, "a red dog in the snow"])
@pytest.mark.parametrize("count, start", [(1, 0.0), (3, 0.5), (1, None)])
def test_is_the_independent_reference(t5, t5_rows, host, count, start):
    loaded, prompts = with_cae(tiny_stock_3(t5=t5)), PROMPTS[:count]
    if not t5_rows:
        rows = as_dict(loaded.active_cae)
        loaded.load_cae_embeddings({name: rows[name] for name in ("cae.text_encoder", "cae.text_encoder_2")})
    loaded.disable_tcam() if start is None else loaded.enable_tcam(start=start)
    output = loaded(
        prompts, num_inference_steps=4, guidance_scale=5.0, fidelity_guidance_scale=2.5, host_prompt=host, host_guidance_scale=1.5 if host else None,
        latents=noise(count), output_type="latent", max_sequence_length=T5,
    )  # fmt: skip
    latents, masks = reference_latents_3(
        loaded, prompts, host, loaded.active_cae, noise(count), steps=4, w_e=5.0, w_f=2.5, w_h=1.5, start=start,
        columns=[CLIP + TOKENS] if t5_rows else [TOKENS + 1], blocks=[2, 3], invert=True, kernel_size=loaded.tcam.kernel_size, sigma=loaded.tcam.sigma,
    )  # fmt: skip
    torch.testing.assert_close(output.images, latents, rtol=1e-4, atol=1e-4 * float(latents.abs().max()))
    if start is None:
        assert output.subject_masks is None
    else:
        assert 0 < output.subject_masks.mean() < 1
        np.testing.assert_array_equal(output.subject_masks.numpy(), masks)


@pytest.mark.parametrize("t5", [True, False])
@pytest.mark.parametrize("token", ["sot", "eot", "subject"])
@pytest.mark.parametrize("layers", [(0,), (1, 4), (5,)])
def test_other_maps_too(t5, token, layers):
    """Blocks with a second attention, without, and the last, whose text goes nowhere."""
    loaded = with_cae(tiny_stock_3(t5=t5))
    loaded.enable_tcam(start=0.0, token=token, layers=layers)
    output = loaded("a dog", num_inference_steps=1, latents=noise(), output_type="latent", max_sequence_length=T5)
    first = CLIP if t5 else 1
    columns = {"sot": [0], "eot": [first + TOKENS], "subject": list(range(first, first + TOKENS))}[token]
    _, masks = reference_latents_3(
        loaded, ["a dog"], None, loaded.active_cae, noise(), steps=1, w_e=7.0, w_f=4.0, w_h=0, start=0.0, columns=columns, blocks=layers,
        invert=token != "subject", kernel_size=loaded.tcam.kernel_size, sigma=loaded.tcam.sigma,
    )  # fmt: skip
    np.testing.assert_array_equal(output.subject_masks.numpy(), masks)


def test_n_prompts_are_n_single_calls(loaded):
    loaded.enable_tcam(start=0.0)
    together = loaded(PROMPTS, num_inference_steps=3, latents=noise(3), output_type="latent", max_sequence_length=T5)
    for i, prompt in enumerate(PROMPTS):
        alone = loaded(prompt, num_inference_steps=3, latents=noise(3)[i : i + 1], output_type="latent", max_sequence_length=T5)
        torch.testing.assert_close(alone.images[0], together.images[i], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.subject_masks[0], together.subject_masks[i])


def test_sliced_streams_give_the_same_images(loaded):
    made = latents_of(loaded, host_prompt="a red dog")
    loaded.enable_stream_slicing()
    torch.testing.assert_close(latents_of(loaded, host_prompt="a red dog"), made, rtol=1e-4, atol=1e-4)


def test_fused_projections():
    loaded = with_cae(tiny_stock_3(version="3"))  # stock's fused attention knows neither norms nor a second attention
    expected = latents_of(loaded)
    loaded.transformer.fuse_qkv_projections()
    torch.testing.assert_close(latents_of(loaded), expected, rtol=1e-4, atol=1e-4)


def test_skip_layer_guidance_is_the_prompts(loaded):
    """Stock adds `scale * (prompt - prompt without layers)`: the same difference, whatever else is mixed in."""
    loaded.disable_tcam()
    options = {"steps": 2, "skip_guidance_layers": [2], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 0.5, "guidance_scale": 5.0}
    with_skip, without = latents_of(loaded, **options), latents_of(loaded, **options | {"skip_guidance_layers": None})
    assert not torch.allclose(with_skip, without)
    seen = []

    def first_step(pipe, i, t, kwargs):
        seen.append(kwargs["latents"])
        return {}

    difference = []
    for pipe in (loaded, StableDiffusion3Pipeline.from_pipe(loaded)):
        pipe.set_progress_bar_config(disable=True)
        seen.clear()
        for skipped in ([2], None):
            latents_of(pipe, **options | {"skip_guidance_layers": skipped}, callback_on_step_end=first_step)
        difference.append(seen[0] - seen[2])
    torch.testing.assert_close(*difference, rtol=1e-3, atol=1e-5)


def test_prompt_embeds_of_their_own_length(loaded):
    """The CAE sequence follows the length of given embeddings."""
    embeds, negative, pooled, negative_pooled = loaded.encode_prompt(PROMPTS[0], None, None, max_sequence_length=T5)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
    torch.testing.assert_close(latents_of(loaded, prompt=None, max_sequence_length=256, **given), latents_of(loaded))


def test_host_embeddings_instead_of_prompts(loaded):
    embeds, _, pooled, _ = loaded.encode_prompt("a red dog", None, None, do_classifier_free_guidance=False, max_sequence_length=T5)
    made = latents_of(loaded, host_prompt_embeds=embeds, host_pooled_prompt_embeds=pooled)
    torch.testing.assert_close(made, latents_of(loaded, host_prompt="a red dog"))
    assert not torch.allclose(latents_of(loaded, host_prompt="a red dog", host_prompt_3="a fish"), made)
    with pytest.raises(ValueError, match="belong together"):
        latents_of(loaded, host_prompt_embeds=embeds)


def test_t5_reads_the_noun_where_a_cae_without_its_rows_is_in_a_prompt(loaded, tmp_path):
    cae = random_cae(loaded)
    rows = {name: cae.embeddings[name] for name in ("text_encoder", "text_encoder_2")}
    save_cae(replace(cae, embeddings=rows), tmp_path / "cae.safetensors", "sd3")
    loaded.load_cae_embeddings(tmp_path / "cae.safetensors", adapter_name="mine")
    embeds, pooled = loaded._encode_cae(rows, prompt_with_embeddings("a <mine> in the snow", "<mine>"), T5)
    embeds[:, CLIP:] = loaded.encode_prompt("a dog in the snow", None, None, do_classifier_free_guidance=False, max_sequence_length=T5)[0][:, CLIP:]
    made = latents_of(loaded, host_prompt="a <mine> in the snow")
    torch.testing.assert_close(made, latents_of(loaded, host_prompt_embeds=embeds, host_pooled_prompt_embeds=pooled))


def test_ip_adapter(loaded):
    """It guides the prompt's stream; with a host prompt, the host's alone. Masks are read as before."""
    load_random_ip_adapter_3(loaded)
    transformer = loaded.transformer
    embeds = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    images = (embeds[:2], embeds[[0, 2]])  # the same negative, two pictures
    prompted, hosted = ([latents_of(loaded, ip_adapter_image_embeds=e, **options) for e in images] for options in ({}, {"host_prompt": "a dog"}))
    assert not torch.allclose(*prompted) and not torch.allclose(*hosted)
    unhosted = [latents_of(loaded, ip_adapter_image_embeds=e, host_prompt="a dog", host_guidance_scale=1e-9) for e in images]
    assert (unhosted[0] - unhosted[1]).abs().max() < 0.01 * (hosted[0] - hosted[1]).abs().max()
    assert all(type(block.attn.processor) is SD3IPAdapterJointAttnProcessor2_0 for block in transformer.transformer_blocks)


@pytest.mark.parametrize("options", [{"clip_skip": 1}, {"guidance_scale": 0.5}, {"negative_prompt": "a fish"}, {"prompt_3": "a fish"}])
def test_stocks_options_act(loaded, options):
    made = latents_of(loaded, **options)
    assert torch.isfinite(made).all() and not torch.allclose(made, latents_of(loaded))


def test_cutting_guidance_off(loaded):
    rows = []
    loaded.transformer.proj_out.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    cut = diffusers.callbacks.SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    latents_of(loaded, steps=4, callback_on_step_end=cut)
    assert rows == [3, 3, 1, 1]


@pytest.mark.parametrize("height, width", [(64, 96), (80, 48)])
def test_any_size(loaded, height, width):
    output = loaded("a dog", height=height, width=width, num_inference_steps=2, output_type="latent", max_sequence_length=T5)
    assert output.images.shape[-2:] == output.subject_masks.shape[-2:] == (height // 4, width // 4)


def test_half_precision(stock):
    stock.to(torch.bfloat16)
    output = with_cae(stock)("a dog", num_inference_steps=2, host_prompt="a red dog", output_type="latent", max_sequence_length=T5)
    assert output.images.dtype == torch.bfloat16 and torch.isfinite(output.images).all()


def test_output_is_stocks_with_masks(loaded):
    output = loaded("a dog", num_inference_steps=2)
    assert output.images[0].size == (64, 64) and output.subject_masks.shape == (1, 16, 16)
    assert isinstance(output, diffusers.pipelines.stable_diffusion_3.pipeline_output.StableDiffusion3PipelineOutput)


def test_everything_is_as_before_after_an_error(stock, loaded):
    processors, expected = loaded.transformer.attn_processors, latents_of(stock)

    def fail(pipe, i, t, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents_of(loaded, callback_on_step_end=fail)
    assert loaded.transformer.attn_processors == processors and "forward" not in vars(loaded.transformer)
    assert torch.equal(latents_of(stock), expected)


def test_a_file_with_t5_rows_loads_without_t5(loaded, tmp_path, caplog):
    save_cae(loaded.active_cae, tmp_path / "cae.safetensors", "sd3")
    small = StableDiffusion3DeGuPipeline.from_pipe(tiny_stock_3(t5=False))
    with caplog.at_level("WARNING", logger="degu.pipelines.cae_file"):
        small.load_cae_embeddings(tmp_path / "cae.safetensors")
    assert list(small.active_cae.embeddings) == ["text_encoder", "text_encoder_2"]
    assert "cae.text_encoder_3" in caplog.text and "left out" in caplog.text


def test_what_does_not_fit_is_refused(loaded):
    rows = as_dict(loaded.active_cae)
    with pytest.raises(ValueError, match="one set for the whole transformer"):
        loaded.load_cae_embeddings({name: value.repeat(2, 1, 1) for name, value in rows.items()})
    with pytest.raises(ValueError, match="expected exactly"):
        loaded.load_cae_embeddings({"cae.text_encoder_3": rows["cae.text_encoder_3"]})
    with pytest.raises(ValueError, match=f"embeds tokens in {DIM}"):
        loaded.load_cae_embeddings(rows | {"cae.text_encoder": torch.zeros(1, TOKENS, 5)})
    for settings, says in (({"resolutions": (1 / 2,)}, "layers"), ({"layers": (6,)}, "0 to 5")):
        with pytest.raises(ValueError, match=says):
            loaded.enable_tcam(**settings)
    assert loaded.get_list_cae_adapters() == ["default_0"]


@pytest.mark.parametrize("self_contained", [False, True])
def test_as_a_custom_pipeline_from_elsewhere(stock, tmp_path, self_contained):
    stock.save_pretrained(tmp_path / "model")
    load_as_custom_pipeline(tmp_path / "model", "pipeline_degu_sd_3", StableDiffusion3DeGuPipeline, tmp_path, self_contained)


@pytest.mark.parametrize("build", [transformer_3_5_medium, transformer_3_5_large])
def test_a_full_size_step(build):
    """Shapes only, on the meta device: SD 3.5's published configurations at 1024 px."""
    with torch.device("meta"):
        transformer = build()
        layers = joint_attention_layers(transformer)
        fidelity = JointFidelityStream(slice(0), {}, None, frozenset(layer.name for layer in layers[8:16]))
        subject, pipe = Condition(torch.empty(1, 333, 4096), torch.empty(1, 2048)), SimpleNamespace(guidance_scale=4.5, num_timesteps=1)
        guided = GuidedDenoiser(pipe, transformer.forward, layers, fidelity, subject, None, 4.0, 0.0, Masking(0.0, SD3.tcam, slice(82, 83), (1,)), sliced=False)
        with torch.no_grad():
            predicted = guided(
                hidden_states=torch.empty(2, 16, 128, 128), timestep=torch.empty(2), encoder_hidden_states=torch.empty(2, 333, 4096),
                pooled_projections=torch.empty(2, 2048), joint_attention_kwargs=None, return_dict=False,
            )[0]  # fmt: skip
    assert predicted.shape == (2, 16, 128, 128) and guided.masks.shape == (1, 128, 128)
