"""Other personalization methods in a stream of their own: their weights act there, and nowhere else unless asked to."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import as_dict, noise, random_cae, tiny_stock, tiny_stock_3, tiny_stock_xl
from peft import LoraConfig
from reference import reference_latents

from degu.pipelines import StableDiffusion3DeGuPipeline, StableDiffusionDeGuPipeline, StableDiffusionXLDeGuPipeline

FAMILIES = {
    "sd": (tiny_stock, StableDiffusionDeGuPipeline, 16, "host_unet"),
    "sdxl": (tiny_stock_xl, StableDiffusionXLDeGuPipeline, 32, "host_unet"),
    "sd3": (tiny_stock_3, StableDiffusion3DeGuPipeline, 16, "host_transformer"),
}


def loaded(family: str, weights=lambda module: None):
    """A pipeline with a CAE; `weights` changes its denoiser first."""
    stock, cls, side, _ = FAMILIES[family]
    pipe = cls.from_pipe(stock())
    pipe.set_progress_bar_config(disable=True)
    if family == "sdxl":
        pipe.enable_tcam(resolutions=(1 / 2,))
    weights(pipe._denoiser)
    pipe.load_cae_embeddings(as_dict(random_cae(pipe)))
    return pipe


def latents_of(pipe, **kwargs):
    side = pipe._denoiser.config.sample_size
    return pipe("a dog in the snow", num_inference_steps=3, output_type="latent", latents=noise(side=side), **kwargs).images


def with_lora(module: torch.nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    module.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))


def fine_tuned(module: torch.nn.Module) -> torch.nn.Module:
    """The denoiser that `with_lora` amounts to, as a model of its own."""
    tuned = copy.deepcopy(module)
    with_lora(tuned)
    tuned.fuse_lora()
    return tuned


def close(made: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("start", [None, 0.25])
def test_the_hosts_own_denoiser_is_the_references(start):
    pipe = loaded("sd")
    tuned = fine_tuned(pipe.unet)
    pipe.disable_tcam() if start is None else pipe.enable_tcam(start=start, kernel_size=3, sigma=1.0)
    made = latents_of(pipe, host_prompt="a red dog", host_unet=tuned, guidance_scale=5.0, fidelity_guidance_scale=2.0, host_guidance_scale=3.0)
    expected, _ = reference_latents(
        pipe, ["a dog in the snow"], "a red dog", pipe.active_cae, noise(), steps=3, w_e=5.0, w_f=2.0, w_h=3.0, start=start, host_unet=tuned
    )
    close(made, expected)


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_act_in_the_host_stream_alone(family, sliced):
    """A LoRA for the host alone is a fine-tuned denoiser for the host; for all streams, a fine-tuned denoiser for all."""
    bare, with_adapter = loaded(family), loaded(family, with_lora)
    tuned = fine_tuned(bare._denoiser)
    all_tuned = loaded(family, lambda module: (with_lora(module), module.fuse_lora()))
    if sliced:
        for pipe in (bare, with_adapter):
            pipe.enable_stream_slicing()
    alone = latents_of(with_adapter, host_prompt="a red dog", host_weights="host")
    close(alone, latents_of(bare, host_prompt="a red dog", **{FAMILIES[family][3]: tuned}))
    everywhere = latents_of(with_adapter, host_prompt="a red dog")
    close(everywhere, latents_of(all_tuned, host_prompt="a red dog"))
    assert not torch.allclose(alone, everywhere, atol=1e-2)
    assert not torch.allclose(alone, latents_of(bare, host_prompt="a red dog"), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_alone_is_stocks_pipeline_with_that_host(family):
    """Bit for bit, at w_e = w_f = 0 and w_h = stock's scale."""
    pipe = loaded(family, with_lora)
    expected = latents_of(pipe, fidelity_guidance_scale=0.0, guidance_scale=4.0)
    side = pipe._denoiser.config.sample_size
    made = pipe(
        "something else", host_prompt="a dog in the snow", guidance_scale=0.0, fidelity_guidance_scale=0.0, host_guidance_scale=4.0,
        num_inference_steps=3, output_type="latent", latents=noise(side=side),
    ).images  # fmt: skip
    assert torch.equal(made, expected)


def test_adapters_are_as_before():
    pipe = loaded("sd", with_lora)
    before = [(p.requires_grad, id(p)) for p in pipe.unet.parameters()]
    expected = latents_of(pipe, fidelity_guidance_scale=0.0)

    def stop(pipe, i, t, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents_of(pipe, host_prompt="a red dog", host_weights="host", callback_on_step_end=stop)
    assert [(p.requires_grad, id(p)) for p in pipe.unet.parameters()] == before
    assert torch.equal(latents_of(pipe, fidelity_guidance_scale=0.0), expected), "the adapter acts again"


def test_text_encoders_adapters_act_in_the_host_stream_alone():
    """The host's prompt is encoded with them, the plain prompt and the CAE without."""
    bare, pipe = loaded("sd"), loaded("sd")
    torch.manual_seed(0)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    host = pipe.encode_prompt("a red dog", "cpu", 1, False)[0]
    close(latents_of(pipe, host_prompt="a red dog", host_weights="host"), latents_of(bare, host_prompt_embeds=host))


def test_errors():
    pipe = loaded("sd", with_lora)
    with pytest.raises(ValueError, match="`host_weights` is 'lora'; it can be 'all'"):
        latents_of(pipe, host_prompt="a dog", host_weights="lora")
    with pytest.raises(ValueError, match="no host stream: give `host_prompt`"):
        latents_of(pipe, host_weights="host")
    with pytest.raises(ValueError, match="no host stream: give `host_prompt`"):
        latents_of(pipe, host_unet=pipe.unet)
    with pytest.raises(ValueError, match="a AutoencoderKL of torch.float32 .* a UNet2DConditionModel of torch.float32"):
        latents_of(pipe, host_prompt="a dog", host_unet=pipe.vae)
    pipe.unet.fuse_lora()
    with pytest.raises(ValueError, match="call `unfuse_lora"):
        latents_of(pipe, host_prompt="a dog", host_weights="host")
