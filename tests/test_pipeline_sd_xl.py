"""What is SDXL's own: two text encoders, pooled text, sizes, its masks. What the families share is tested with SD."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import DIM, DIM_2, TOKENS, as_dict, load_as_custom_pipeline, load_random_ip_adapter, noise, random_cae, tiny_stock_xl
from diffusers import StableDiffusionXLPipeline
from full_size import unet_xl
from reference import reference_latents, sdxl_conditions

from degu.attention_processors import LayerwiseStream, cross_attention_layers
from degu.pipelines import StableDiffusionXLDeGuPipeline
from degu.pipelines.cae_encoding import cae_sequence
from degu.pipelines.cae_file import ContextAgnosticEmbeddings, save_cae
from degu.pipelines.families import SDXL
from degu.pipelines.guided_denoiser import GuidedDenoiser, Masking
from degu.pipelines.hosts import HostCondition
from degu.pipelines.streams import Condition

PROMPTS = ["a dog in the snow", "a cat on the beach", "a mug at night"]


@pytest.fixture
def stock() -> StableDiffusionXLPipeline:
    return tiny_stock_xl()


@pytest.fixture
def loaded(stock) -> StableDiffusionXLDeGuPipeline:
    """Shares its weights with `stock`."""
    pipe = StableDiffusionXLDeGuPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_cae_embeddings(as_dict(random_cae(pipe)))
    return pipe


def latents_of(pipe, prompt=PROMPTS[0], steps=3, **kwargs):
    kwargs = {"latents": noise(side=32), "generator": torch.Generator().manual_seed(7)} | kwargs
    return pipe(prompt, num_inference_steps=steps, output_type="latent", **kwargs).images


@pytest.mark.parametrize("kind", [diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.DDIMScheduler])
def test_off_is_stock_bit_for_bit(stock, loaded, kind):
    for pipe in (stock, loaded):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    expected = latents_of(stock)
    assert torch.equal(latents_of(loaded, fidelity_guidance_scale=0.0), expected)
    loaded.unload_cae_embeddings()
    assert torch.equal(latents_of(loaded), expected)


def test_signature_is_stocks_then_ours():
    names = list(inspect.signature(StableDiffusionXLDeGuPipeline.__call__).parameters)
    stock = list(inspect.signature(StableDiffusionXLPipeline.__call__).parameters)
    assert [n for n in names if n in stock] == stock
    assert [n for n in names if n not in stock] == [
        "fidelity_guidance_scale", "host_prompt", "host_prompt_2", "host_prompt_embeds", "host_pooled_prompt_embeds", "host_guidance_scale",
        "host", "host_weights", "host_unet", "subject_mask",
    ]  # fmt: skip


@pytest.mark.parametrize("host", [None, "a red dog in the snow"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("start", [0.0, 0.5, None])
def test_is_the_independent_reference(loaded, host, count, start):
    prompts = PROMPTS[:count]
    loaded.disable_tcam() if start is None else loaded.enable_tcam(start=start)
    output = loaded(
        prompts, num_inference_steps=4, guidance_scale=5.0, fidelity_guidance_scale=2.5, host_prompt=host,
        host_guidance_scale=1.5 if host else None, latents=noise(count, 32), output_type="latent",
    )  # fmt: skip
    latents, masks = reference_latents(
        loaded, prompts, host, loaded.active_cae, noise(count, 32), steps=4, w_e=5.0, w_f=2.5, w_h=1.5, start=start, token="eot",
        fractions=(1 / 4,), kernel_size=loaded.tcam.kernel_size, sigma=loaded.tcam.sigma, conditions=sdxl_conditions,
    )  # fmt: skip
    torch.testing.assert_close(output.images, latents, rtol=1e-4, atol=1e-4 * float(latents.abs().max()))
    if start is None:
        assert output.subject_masks is None
    else:
        assert 0 < output.subject_masks.mean() < 1
        np.testing.assert_array_equal(output.subject_masks.numpy(), masks)


def test_one_set_for_several_layers(loaded):
    """A set that is named for a module serves all layers in it, as if each had it."""
    names = [layer.name for layer in loaded._layers()]
    blocks = list(dict.fromkeys(name.split(".transformer_blocks.")[0] for name in names))
    assert len(names) == 11 and len(blocks) == 7
    generator = torch.Generator().manual_seed(2)
    sets = {name: torch.randn(len(blocks), TOKENS, dim, generator=generator) for name, dim in (("text_encoder", DIM), ("text_encoder_2", DIM_2))}
    of_layer = [blocks.index(name.split(".transformer_blocks.")[0]) for name in names]
    contexts = []
    for cae in (
        ContextAgnosticEmbeddings(sets, tuple(blocks)),
        ContextAgnosticEmbeddings({name: rows[of_layer] for name, rows in sets.items()}, tuple(names)),
    ):
        loaded._cae_adapters["default_0"] = cae
        contexts.append(loaded._encode_subject(loaded.active_cae, [cae_sequence], {})[1])
    assert list(contexts[0]) == list(contexts[1]) == names
    for name in names:
        torch.testing.assert_close(contexts[0][name], contexts[1][name])


def test_sizes_and_pooled_text_of_each_stream(loaded):
    """The null stream keeps its negative sizes, all others have the prompt's; also for several images."""
    sizes, pooled = [], []
    loaded.unet.add_time_proj.register_forward_pre_hook(lambda module, args: sizes.append(args[0].view(-1, 6)))
    loaded.unet.add_embedding.register_forward_pre_hook(lambda module, args: pooled.append(args[0][:, :DIM_2]))
    latents_of(
        loaded, PROMPTS[:2], steps=1, latents=noise(2, 32), host_prompt="a red dog",
        original_size=(128, 100), negative_original_size=(8, 8), negative_target_size=(4, 4),
    )  # fmt: skip
    prompt, negative = [128, 100, 0, 0, 128, 128], [8, 8, 0, 0, 4, 4]
    assert sizes[0].tolist() == [negative] * 2 + [prompt] * 6
    null, editability, fidelity, host = pooled[0].chunk(4)
    assert not null.any(), "an empty negative prompt is zeros"
    assert not torch.equal(*editability), "each prompt its own"
    assert torch.equal(*fidelity) and torch.equal(*host) and not torch.equal(fidelity, host)


def test_second_prompts(loaded):
    plain = latents_of(loaded, host_prompt="a dog")
    assert not torch.allclose(latents_of(loaded, host_prompt="a dog", host_prompt_2="a fish"), plain)
    assert not torch.allclose(latents_of(loaded, prompt_2="a fish", host_prompt="a dog"), plain)


def test_host_embeddings_instead_of_prompts(loaded):
    embeds, _, pooled, _ = loaded.encode_prompt("a red dog", device="cpu", do_classifier_free_guidance=False)
    made = latents_of(loaded, host_prompt_embeds=embeds, host_pooled_prompt_embeds=pooled)
    torch.testing.assert_close(made, latents_of(loaded, host_prompt="a red dog"))
    with pytest.raises(ValueError, match="belong together"):
        latents_of(loaded, host_prompt_embeds=embeds)


def test_several_images_per_prompt(loaded):
    output = loaded(PROMPTS[:2], num_images_per_prompt=2, num_inference_steps=2, latents=noise(4, 32), host_prompt=["x", "y"], output_type="latent")
    repeated = loaded([p for p in PROMPTS[:2] for _ in range(2)], num_inference_steps=2, latents=noise(4, 32), host_prompt=["x", "x", "y", "y"], output_type="latent")
    torch.testing.assert_close(output.images, repeated.images, rtol=1e-4, atol=1e-4)
    assert torch.equal(output.subject_masks, repeated.subject_masks)


def test_sliced_streams_give_the_same_images(loaded):
    made = latents_of(loaded, host_prompt="a red dog")
    loaded.enable_stream_slicing()
    torch.testing.assert_close(latents_of(loaded, host_prompt="a red dog"), made, rtol=1e-4, atol=1e-4)


def test_ip_adapter(loaded):
    """It guides the prompt's stream; with a host prompt, the host's alone."""
    load_random_ip_adapter(loaded)
    embeds = [torch.randn(2, 1, DIM, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    images = (embeds[0], torch.cat([embeds[0][:1], embeds[1][1:]]))  # the same negative, two pictures
    prompted, hosted = ([latents_of(loaded, ip_adapter_image_embeds=[e], **options) for e in images] for options in ({}, {"host_prompt": "a dog"}))
    assert not torch.allclose(*prompted) and not torch.allclose(*hosted)
    unhosted = [latents_of(loaded, ip_adapter_image_embeds=[e], host_prompt="a dog", host_guidance_scale=1e-9) for e in images]
    assert (unhosted[0] - unhosted[1]).abs().max() < 0.01 * (hosted[0] - hosted[1]).abs().max()


@pytest.mark.parametrize("options", [{"denoising_end": 0.5}, {"guidance_rescale": 0.7}, {"clip_skip": 1}, {"guidance_scale": 0.5}, {"negative_prompt": "a fish"}])
def test_stocks_options_act(loaded, options):
    made = latents_of(loaded, steps=4, **options)
    assert torch.isfinite(made).all() and not torch.allclose(made, latents_of(loaded, steps=4))


@pytest.mark.parametrize("height, width", [(128, 192), (96, 72)])
def test_any_size(loaded, height, width):
    output = loaded("a dog", height=height, width=width, num_inference_steps=2, output_type="latent")
    assert output.images.shape[-2:] == output.subject_masks.shape[-2:] == (height // 4, width // 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(stock, dtype):
    stock.to(dtype)
    pipe = StableDiffusionXLDeGuPipeline.from_pipe(stock)
    pipe.load_cae_embeddings(as_dict(random_cae(pipe)))
    output = pipe("a dog", num_inference_steps=2, host_prompt="a red dog", output_type="latent")
    assert output.images.dtype == dtype and torch.isfinite(output.images).all()


def test_output_is_stocks_with_masks(loaded):
    output = loaded("a dog", num_inference_steps=2)
    assert output.images[0].size == (128, 128) and output.subject_masks.shape == (1, 32, 32)
    assert isinstance(output, diffusers.pipelines.stable_diffusion_xl.StableDiffusionXLPipelineOutput)


def test_everything_is_as_before_after_an_error(stock, loaded):
    processors, expected = loaded.unet.attn_processors, latents_of(stock)

    def fail(pipe, i, t, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents_of(loaded, callback_on_step_end=fail)
    assert loaded.unet.attn_processors == processors and "forward" not in vars(loaded.unet)
    assert torch.equal(latents_of(stock), expected)


def test_what_does_not_fit_is_refused(stock, loaded, tmp_path):
    rows = as_dict(loaded.active_cae)
    with pytest.raises(ValueError, match="text_encoder_2"):
        loaded.load_cae_embeddings({"cae.text_encoder": rows["cae.text_encoder"]})
    elsewhere = tuple(f"elsewhere.{layer.name}" for layer in loaded._layers())
    save_cae(ContextAgnosticEmbeddings(loaded.active_cae.embeddings, elsewhere), tmp_path / "layers.safetensors", "sdxl")
    with pytest.raises(ValueError, match="other layers"):
        loaded.load_cae_embeddings(tmp_path / "layers.safetensors")
    save_cae(loaded.active_cae, tmp_path / "sd.safetensors", "sd")
    with pytest.raises(ValueError, match="family 'sd'.*family 'sdxl'"):
        loaded.load_cae_embeddings(tmp_path / "sd.safetensors")
    refiner = StableDiffusionXLDeGuPipeline(stock.vae, None, stock.text_encoder_2, None, stock.tokenizer_2, stock.unet, stock.scheduler, add_watermarker=False)
    with pytest.raises(ValueError, match="both text encoders"):
        refiner.load_cae_embeddings(rows)
    assert loaded.get_list_cae_adapters() == ["default_0"] and refiner.get_list_cae_adapters() == []


@pytest.mark.parametrize("self_contained", [False, True])
def test_as_a_custom_pipeline_from_elsewhere(stock, tmp_path, self_contained):
    stock.save_pretrained(tmp_path / "model")
    load_as_custom_pipeline(tmp_path / "model", "pipeline_degu_sd_xl", StableDiffusionXLDeGuPipeline, tmp_path, self_contained)


def test_a_full_size_step():
    """Shapes only, on the meta device: the published configuration at 1024 px, with a host."""
    with torch.device("meta"):
        unet = unet_xl()
        layers = cross_attention_layers(unet)
        assert len(layers) == 70 and len({layer.name.split(".transformer_blocks.")[0] for layer in layers}) == 11
        contexts = {layer.name: torch.empty(1, 77, 2048) for layer in layers}
        captured = frozenset(layer.name for layer in layers if layer.decoder and layer.map_size((128, 128)) == (32, 32))
        fidelity, subject = LayerwiseStream(slice(0), contexts, None, captured), Condition(None, torch.empty(1, 1280))
        host = HostCondition(torch.empty(2, 77, 2048), torch.empty(2, 1280))
        pipe = SimpleNamespace(guidance_scale=5.0, guidance_rescale=0.0, num_timesteps=1)
        masking = Masking(0.0, SDXL.tcam, slice(6, 7), (2,))
        guided = GuidedDenoiser(pipe, unet.forward, layers, fidelity, subject, host, 4.0, 3.0, masking, sliced=False)
        added = {"text_embeds": torch.empty(4, 1280), "time_ids": torch.empty(4, 6)}
        with torch.no_grad():
            predicted = guided(torch.empty(4, 4, 128, 128), torch.tensor(500), torch.empty(4, 77, 2048), return_dict=False, added_cond_kwargs=added)[0]
    assert predicted.shape == (4, 4, 128, 128) and guided.masks.shape == (2, 128, 128)
