"""The pipeline: stock's where DeGu is off, the method's where it is on, and nothing left behind."""

from __future__ import annotations

import inspect

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import DIM, SHIPPED, as_dict, load_as_custom_pipeline, load_random_ip_adapter, noise, random_cae, tiny_stock
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from reference import reference_latents

from degu.pipelines import StableDiffusionDeGuPipeline

SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpm++-2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm++-2m-sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++-singlestep": (diffusers.DPMSolverSinglestepScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "v-prediction": (diffusers.DDIMScheduler, {"prediction_type": "v_prediction"}),
}


def latents_of(pipe, prompt="a dog in the snow", count=1, steps=4, **kwargs):
    kwargs = {"latents": noise(count), "generator": torch.Generator().manual_seed(7)} | kwargs
    return pipe(prompt, num_inference_steps=steps, output_type="latent", **kwargs).images


def counted(pipe, monkeypatch) -> list[int]:
    """The batch size of every evaluation of the denoiser."""
    rows, forward = [], type(pipe.unet).forward

    def spy(self, sample, *args, **kwargs):
        rows.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(type(pipe.unet), "forward", spy)
    return rows


# --- off: stock ---


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("off", ["no CAE", "w_f = 0"])
def test_off_is_stock_bit_for_bit(stock, pipe, name, off, monkeypatch):
    kind, options = SCHEDULERS[name]
    stock.scheduler = kind.from_config(stock.scheduler.config, **options)
    pipe.scheduler = kind.from_config(stock.scheduler.config, **options)
    kwargs = {}
    if off == "w_f = 0":
        pipe.load_cae_embeddings(as_dict(random_cae(pipe)))
        kwargs = {"fidelity_guidance_scale": 0.0}
    rows = counted(stock, monkeypatch)
    expected = latents_of(stock)
    of_stock, rows[:] = list(rows), []
    assert torch.equal(latents_of(pipe, **kwargs), expected)
    assert rows == of_stock


def test_signature_is_stocks_then_ours():
    names = list(inspect.signature(StableDiffusionDeGuPipeline.__call__).parameters)
    stock = list(inspect.signature(StableDiffusionPipeline.__call__).parameters)
    ours = ["fidelity_guidance_scale", "host_prompt", "host_prompt_embeds", "host_guidance_scale", "host", "host_weights", "host_unet", "subject_mask"]
    assert [n for n in names if n not in ours] == stock and [n for n in names if n in ours] == ours


def test_arguments_by_position(stock, pipe):
    args = ("a dog", 64, 64, 2)
    assert torch.equal(pipe(*args, output_type="latent", latents=noise()).images, stock(*args, output_type="latent", latents=noise()).images)


# --- on: the method ---


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("start", [0.0, 0.5, None])
def test_is_the_independent_reference(loaded, host, count, start):
    """`start` None: masking off. 0.5: two steps before and two after masking begins."""
    prompts = ["a dog in the snow", "a cat on the beach", "a mug at night"][:count]
    host_prompt = "a red dog in the snow" if host else None
    loaded.disable_tcam() if start is None else loaded.enable_tcam(start=start)
    output = loaded(
        prompts, num_inference_steps=4, guidance_scale=5.0, fidelity_guidance_scale=2.5, host_prompt=host_prompt,
        host_guidance_scale=1.5 if host else None, latents=noise(count), output_type="latent",
    )  # fmt: skip
    latents, masks = reference_latents(
        loaded, prompts, host_prompt, loaded.active_cae, noise(count), steps=4, w_e=5.0, w_f=2.5, w_h=1.5, start=start,
        kernel_size=loaded.tcam.kernel_size, sigma=loaded.tcam.sigma,
    )  # fmt: skip
    torch.testing.assert_close(output.images, latents, rtol=1e-4, atol=1e-4 * float(latents.abs().max()))
    if start is None:
        assert output.subject_masks is None
    else:
        assert output.subject_masks.shape == (count, 16, 16)
        assert 0 < output.subject_masks.mean() < 1
        np.testing.assert_array_equal(output.subject_masks.numpy(), masks)


@pytest.mark.parametrize("token", ["sot", "eot", "subject"])
@pytest.mark.parametrize("resolutions", [(1 / 4,), (1 / 2,), (1 / 4, 1 / 2), (1,)])
def test_other_maps_too(loaded, token, resolutions):
    loaded.enable_tcam(start=0.0, token=token, resolutions=resolutions)
    output = loaded("a dog", num_inference_steps=1, fidelity_guidance_scale=2.5, latents=noise(), output_type="latent")
    _, masks = reference_latents(
        loaded, ["a dog"], None, loaded.active_cae, noise(), steps=1, w_e=7.5, w_f=2.5, w_h=0, start=0.0, token=token,
        fractions=resolutions, kernel_size=loaded.tcam.kernel_size, sigma=loaded.tcam.sigma,
    )  # fmt: skip
    np.testing.assert_array_equal(output.subject_masks.numpy(), masks)


@pytest.mark.parametrize("w_e, streams", [(0.0, 2), (0.5, 3), (1.0, 3), (7.5, 3)])
def test_any_prompt_scale(loaded, w_e, streams, monkeypatch):
    """Also where stock would not use guidance; a stream of weight 0 is not evaluated."""
    loaded.disable_tcam()
    rows = counted(loaded, monkeypatch)
    made = latents_of(loaded, guidance_scale=w_e, fidelity_guidance_scale=2.0)
    assert rows == [streams] * 4
    expected, _ = reference_latents(loaded, ["a dog in the snow"], None, loaded.active_cae, noise(), steps=4, w_e=w_e, w_f=2.0, w_h=0, start=None)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_not_layerwise(pipe):
    """One row for all layers is the same row sixteen times."""
    single = random_cae(pipe, layerwise=False)
    many = {name: rows.expand(16, -1, -1) for name, rows in as_dict(single).items()}
    pipe.load_cae_embeddings(as_dict(single), adapter_name="single")
    pipe.load_cae_embeddings(many, adapter_name="many")
    made = latents_of(pipe)
    pipe.set_cae_adapter("single")
    torch.testing.assert_close(latents_of(pipe), made)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_guided(loaded, name):
    kind, options = SCHEDULERS[name]
    loaded.scheduler = kind.from_config(loaded.scheduler.config, **options)
    on, off = latents_of(loaded), latents_of(loaded, fidelity_guidance_scale=0.0)
    assert torch.isfinite(on).all() and not torch.allclose(on, off)


def test_start_counts_steps(loaded):
    """Step i is masked when i >= start * steps."""
    seen = []

    def look(pipe, i, t, kwargs):
        seen.append(pipe.subject_masks is not None)
        return {}

    loaded.enable_tcam(start=0.5)
    latents_of(loaded, steps=5, callback_on_step_end=look)
    assert seen == [False, False, False, True, True]


def test_n_prompts_are_n_single_calls(loaded):
    loaded.enable_tcam(start=0.0)
    prompts = ["a dog in the snow", "a cat on the beach", "a mug"]
    together = loaded(prompts, num_inference_steps=3, latents=noise(3), output_type="latent")
    for i, prompt in enumerate(prompts):
        alone = loaded(prompt, num_inference_steps=3, latents=noise(3)[i : i + 1], output_type="latent")
        torch.testing.assert_close(alone.images[0], together.images[i], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.subject_masks[0], together.subject_masks[i])


def test_several_images_per_prompt_and_generators(loaded):
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    output = loaded(["a dog", "a cat"], num_images_per_prompt=2, generator=generators, num_inference_steps=2, host_prompt=["x", "y"], output_type="latent")
    assert len(output.images) == len(output.subject_masks) == 4
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    repeated = loaded(["a dog", "a dog", "a cat", "a cat"], generator=generators, num_inference_steps=2, host_prompt=["x", "x", "y", "y"], output_type="latent")
    torch.testing.assert_close(output.images, repeated.images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("host", [None, "a red dog"])
def test_sliced_streams_give_the_same_images(loaded, host, monkeypatch):
    made = latents_of(loaded, host_prompt=host)
    loaded.enable_stream_slicing()
    rows = counted(loaded, monkeypatch)
    torch.testing.assert_close(latents_of(loaded, host_prompt=host), made, rtol=1e-4, atol=1e-4)
    assert rows == [1] * 4 * (4 if host else 3)
    loaded.disable_stream_slicing()
    rows.clear()
    latents_of(loaded, host_prompt=host)
    assert rows == [4 if host else 3] * 4


# --- the user's own mask ---


def half_mask() -> np.ndarray:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    return mask


@pytest.mark.parametrize("kind", ["pil", "uint8", "bool", "tensor", "list"])
def test_own_mask(loaded, kind):
    mask = half_mask()
    given = {"pil": PIL.Image.fromarray(mask), "uint8": mask, "bool": mask > 0, "tensor": torch.from_numpy(mask).float() / 255, "list": [mask, mask > 0]}[kind]
    output = loaded(["a dog", "a cat"], num_inference_steps=3, subject_mask=given, output_type="latent", latents=noise(2))
    expected = torch.zeros(2, 16, 16)
    expected[:, :, :8] = 1
    assert torch.equal(output.subject_masks, expected)


def test_own_mask_decides_where_streams_act(loaded):
    """All subject: the prompt's stream no longer matters. No subject: the fidelity stream no longer matters."""
    loaded.enable_tcam(start=0.0)
    ones, zeros = np.ones((64, 64), bool), np.zeros((64, 64), bool)
    torch.testing.assert_close(latents_of(loaded, subject_mask=ones, guidance_scale=2.0), latents_of(loaded, subject_mask=ones, guidance_scale=9.0))
    torch.testing.assert_close(latents_of(loaded, subject_mask=zeros), latents_of(loaded, fidelity_guidance_scale=0.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask, says", [(np.zeros((5, 8, 8)), "5 masks for 1 images"), (np.zeros((2, 3, 8, 8)), "has to be"), (np.full((8, 8), 3.0), "0..1")])
def test_bad_masks_are_refused(loaded, mask, says):
    with pytest.raises(ValueError, match=says):
        latents_of(loaded, subject_mask=mask)


# --- what can't work says so ---


def test_scales_without_their_conditions(pipe, loaded):
    with pytest.raises(ValueError, match="host_guidance_scale"):
        latents_of(loaded, host_guidance_scale=2.0)
    with pytest.raises(ValueError, match="not both"):
        latents_of(loaded, host_prompt="x", host_prompt_embeds=torch.zeros(1, 32, DIM))
    with pytest.raises(ValueError, match="2 host prompts for 1"):
        latents_of(loaded, host_prompt=["x", "y"])
    with pytest.raises(ValueError, match="tokens"):
        latents_of(loaded, prompt=None, prompt_embeds=torch.zeros(1, 40, DIM), negative_prompt_embeds=torch.zeros(1, 40, DIM), host_prompt="x")
    loaded.unload_cae_embeddings()
    with pytest.raises(ValueError, match="no CAE is active"):
        latents_of(loaded, fidelity_guidance_scale=2.0)
    with pytest.raises(ValueError, match="subject_mask"):
        latents_of(loaded, subject_mask=half_mask())


@pytest.mark.parametrize(
    "settings",
    [{"start": -0.1}, {"start": 1.5}, {"token": "pad"}, {"kernel_size": 4}, {"kernel_size": 0}, {"sigma": 0.0}, {"resolutions": (1 / 8,)}, {"resolutions": ()}, {"layers": (1,)}],
)  # fmt: skip
def test_bad_masking_settings_change_nothing(loaded, settings):
    loaded.enable_tcam(start=0.3)
    with pytest.raises(ValueError):
        loaded.enable_tcam(**settings)
    assert loaded.tcam.start == 0.3


# --- what comes with stock's call ---


def test_prompt_embeds_instead_of_prompts(loaded):
    expected = latents_of(loaded, host_prompt="a red dog")
    embeds, negative = loaded.encode_prompt("a dog in the snow", "cpu", 1, True)
    host, _ = loaded.encode_prompt("a red dog", "cpu", 1, False)
    made = latents_of(loaded, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative, host_prompt_embeds=host)
    torch.testing.assert_close(made, expected)


def test_prompt_embeds_longer_than_the_cae_sequence(loaded):
    """As prompt-weighting tools make them."""
    generator = torch.Generator().manual_seed(0)
    embeds, negative = (torch.randn(1, 64, DIM, generator=generator) for _ in range(2))
    assert torch.isfinite(latents_of(loaded, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative)).all()


def test_negative_prompt_reaches_the_null_stream(loaded):
    assert not torch.allclose(latents_of(loaded, negative_prompt="a fish"), latents_of(loaded))


def test_clip_skip(stock, loaded):
    """For the prompts; the CAE is read from the layer that it was trained for."""
    try:
        latents_of(stock, clip_skip=1)
    except AttributeError as error:  # diffusers up to 0.42 with a transformers that has no `CLIPTextModel.text_model`
        with pytest.raises(AttributeError, match=str(error)):
            latents_of(loaded, clip_skip=1)
        return
    assert not torch.allclose(latents_of(loaded, clip_skip=1), latents_of(loaded))


def test_guidance_rescale(loaded):
    """Rescaled to the standard deviation of the prompt's stream, as stock rescales its own mixture."""
    loaded.disable_tcam()
    made = latents_of(loaded, steps=1, guidance_rescale=0.7, fidelity_guidance_scale=2.0)
    expected, _ = reference_latents(
        loaded, ["a dog in the snow"], None, loaded.active_cae, noise(), steps=1, w_e=7.5, w_f=2.0, w_h=0, start=None, guidance_rescale=0.7
    )
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(made, latents_of(loaded, steps=1, fidelity_guidance_scale=2.0))


@pytest.mark.parametrize("height, width", [(64, 96), (96, 64), (72, 40), (128, 128)])
def test_any_size(loaded, height, width):
    output = loaded("a dog", height=height, width=width, num_inference_steps=2, output_type="latent")
    assert output.images.shape[-2:] == output.subject_masks.shape[-2:] == (height // 4, width // 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(stock, dtype):
    stock.to(dtype)
    pipe = StableDiffusionDeGuPipeline.from_pipe(stock)
    assert pipe.unet is stock.unet and pipe.dtype == dtype
    pipe.load_cae_embeddings(as_dict(random_cae(pipe)))
    output = pipe("a dog", num_inference_steps=2, output_type="latent")
    assert output.images.dtype == dtype and torch.isfinite(output.images).all()


def test_attention_slicing(loaded):
    expected = latents_of(loaded)
    loaded.enable_attention_slicing(1)
    torch.testing.assert_close(latents_of(loaded), expected, rtol=1e-3, atol=1e-3)


def test_pictures_and_tuples(loaded):
    output = loaded("a dog", num_inference_steps=1)
    assert output.images[0].size == (64, 64) and isinstance(output, diffusers.pipelines.stable_diffusion.StableDiffusionPipelineOutput)
    images, nsfw = loaded("a dog", num_inference_steps=1, return_dict=False)
    assert images[0].size == (64, 64) and nsfw is None


def test_interrupt(loaded):
    def stop(pipe, i, t, kwargs):
        pipe._interrupt = i == 1
        return {}

    rows = []
    loaded.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    latents_of(loaded, steps=4, callback_on_step_end=stop)
    assert rows == [3, 3]


def test_callback_changes_scale_and_latents(loaded):
    def fade(pipe, i, t, kwargs):
        pipe._guidance_scale = 0.0
        return {"latents": kwargs["latents"] * 0.5}

    rows = []
    loaded.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    latents_of(loaded, steps=3, callback_on_step_end=fade)
    assert rows == [3, 2, 2]


def test_cutting_guidance_off(loaded):
    """diffusers' own callback drops the negative half of the prompt: from there on the plain prediction counts."""
    rows = []
    loaded.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    latents_of(loaded, steps=4, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1))
    assert rows == [3, 3, 1, 1]


def test_ip_adapter(loaded):
    """As an input it guides the prompt's stream; with a host prompt, the host's alone. Its weights stay in place."""
    load_random_ip_adapter(loaded)
    state, processors = loaded.unet.state_dict(), loaded.unet.attn_processors
    embeds = [torch.randn(2, 1, DIM, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    first, second = (latents_of(loaded, ip_adapter_image_embeds=[e]) for e in embeds)
    assert not torch.allclose(first, second)
    hosted = [latents_of(loaded, ip_adapter_image_embeds=[e], host_prompt="a dog") for e in embeds]
    assert not torch.allclose(*hosted)
    # With a vanishing host the image counts for nothing: what is left of it is rounding, which the steps amplify.
    images = (embeds[0], torch.cat([embeds[0][:1], embeds[1][1:]]))
    unhosted = [latents_of(loaded, ip_adapter_image_embeds=[e], host_prompt="a dog", host_guidance_scale=1e-9) for e in images]
    assert (unhosted[0] - unhosted[1]).abs().max() < 0.01 * (hosted[0] - hosted[1]).abs().max()
    assert loaded.unet.attn_processors == processors and loaded.unet.state_dict().keys() == state.keys()


def test_textual_inversion_as_host(loaded):
    loaded.load_textual_inversion(torch.randn(2, DIM, generator=torch.Generator().manual_seed(0)), token="<my-dog>")
    assert not torch.allclose(latents_of(loaded, host_prompt="a <my-dog> in the snow"), latents_of(loaded, host_prompt="a dog in the snow"))


def test_lora_as_host(loaded):
    from peft import LoraConfig

    plain = latents_of(loaded, host_prompt="a dog")
    loaded.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    assert not torch.allclose(latents_of(loaded, host_prompt="a dog"), plain)
    loaded.unet.delete_adapters("default")
    torch.testing.assert_close(latents_of(loaded, host_prompt="a dog"), plain)


# --- nothing is left behind ---


def fingerprint(pipe):
    return (
        {name: id(p) for name, p in pipe.unet.attn_processors.items()},
        "forward" in vars(pipe.unet),
        {name: value.clone() for name, value in {**pipe.unet.state_dict(), **pipe.text_encoder.state_dict()}.items()},
        len(pipe.tokenizer),
        [len(m._forward_hooks) for m in pipe.text_encoder.modules()],
    )


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("sliced", [False, True])
def test_everything_is_as_before(stock, loaded, error, sliced):
    before, expected = fingerprint(loaded), latents_of(stock)
    if sliced:
        loaded.enable_stream_slicing()

    def fail(pipe, i, t, kwargs):
        assert fingerprint(pipe)[0] == before[0], "callbacks see the model's own processors"
        if error is not None and i == 1:
            raise error("stop")
        return {}

    if error is None:
        latents_of(loaded, callback_on_step_end=fail)
    else:
        with pytest.raises(error):
            latents_of(loaded, callback_on_step_end=fail)
    after = fingerprint(loaded)
    assert after[:2] == before[:2] and after[3:] == before[3:]
    assert all(torch.equal(after[2][name], value) for name, value in before[2].items())
    assert torch.equal(latents_of(stock), expected)


def test_an_error_inside_the_denoiser_restores_too(loaded):
    before = fingerprint(loaded)
    hook = loaded.unet.conv_out.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        latents_of(loaded)
    hook.remove()
    assert fingerprint(loaded)[:2] == before[:2]


def test_offload_hooks_survive(loaded):
    """As `enable_model_cpu_offload` installs them; that itself wants an accelerator."""
    from accelerate.hooks import CpuOffload, add_hook_to_module

    expected = latents_of(loaded)
    add_hook_to_module(loaded.unet, CpuOffload("cpu"))
    hooked = loaded.unet.forward
    torch.testing.assert_close(latents_of(loaded), expected)
    assert loaded.unet.forward is hooked


def test_sequential_offload(loaded):
    """Weights live elsewhere and come when needed."""
    from accelerate import cpu_offload

    expected = latents_of(loaded)
    for module in (loaded.vae, loaded.text_encoder, loaded.unet):
        cpu_offload(module, torch.device("cpu"))
    assert loaded.text_encoder.device.type == "meta"
    torch.testing.assert_close(latents_of(loaded), expected)


def test_compiled_denoiser(loaded):
    expected = latents_of(loaded)
    loaded.unet = torch.compile(loaded.unet, backend="eager")
    torch.testing.assert_close(latents_of(loaded), expected, rtol=1e-4, atol=1e-4)


# --- where pipelines come from ---


def test_from_pipe_and_back(stock, loaded):
    assert loaded.unet is stock.unet and loaded.vae is stock.vae
    back = StableDiffusionPipeline.from_pipe(loaded)
    back.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(back), latents_of(stock))


def test_save_and_load_both_ways(stock, loaded, tmp_path):
    loaded.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    again = StableDiffusionDeGuPipeline.from_pretrained(tmp_path / "stock")
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    for pipe in (again, plain):
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(latents_of(pipe), latents_of(stock))


@pytest.mark.parametrize("self_contained", [False, True])
def test_as_a_custom_pipeline_from_elsewhere(tmp_path, self_contained):
    load_as_custom_pipeline(SHIPPED, "pipeline_degu_sd", StableDiffusionDeGuPipeline, tmp_path, self_contained)


def test_too_many_tokens_for_the_text_encoder(pipe):
    with pytest.raises(ValueError, match="tokens"):
        pipe.load_cae_embeddings({"cae.text_encoder": torch.zeros(1, 31, DIM)})
    assert pipe.get_list_cae_adapters() == []


def test_other_depths():
    """With two decoder resolutions only, the default candidates are those two."""
    stock = tiny_stock(
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2, block_out_channels=(8, 16, 16)
    )
    pipe = StableDiffusionDeGuPipeline.from_pipe(stock)
    pipe.load_cae_embeddings(as_dict(random_cae(pipe)))
    pipe.enable_tcam(start=0.0)
    output = pipe("a dog", num_inference_steps=1, latents=noise(), output_type="latent", fidelity_guidance_scale=2.5)
    _, masks = reference_latents(
        pipe, ["a dog"], None, pipe.active_cae, noise(), steps=1, w_e=7.5, w_f=2.5, w_h=0, start=0.0, fractions=(1 / 2, 1),
        kernel_size=pipe.tcam.kernel_size, sigma=pipe.tcam.sigma,
    )  # fmt: skip
    np.testing.assert_array_equal(output.subject_masks.numpy(), masks)
