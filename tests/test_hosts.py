"""Other personalization methods in a stream of their own: their weights act there, and nowhere else unless asked to."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_dict, noise, random_cae, tiny_stock, tiny_stock_3, tiny_stock_xl
from peft import LoraConfig
from PIL import Image
from reference import RecordingAttention, reference_latents
from safetensors.torch import load_file

from degu.pipelines import StableDiffusion3DeGuPipeline, StableDiffusionDeGuPipeline, StableDiffusionXLDeGuPipeline
from degu.pipelines.cae_file import ContextAgnosticEmbeddings
from degu.training.arguments import parse_host_args
from degu.training.backbones import load_backbone
from degu.training.host_method import METHODS, TEMPLATES
from degu.training.latent_cache import Batch
from degu.training.train_host import main as train_host

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


# --- embeddings inside the host prompt (P+) ---


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("sliced", [False, True])
def test_one_embedding_for_all_layers_is_a_textual_inversion(family, sliced):
    pipe = loaded(family)
    rows = {name: torch.randn(1, 2, encoder.get_input_embeddings().weight.shape[1], generator=torch.Generator().manual_seed(3)) for name, (encoder, _) in pipe._text_encoders().items()}
    for (encoder, tokenizer), row in zip(list(pipe._text_encoders().values()), rows.values()):
        pipe.load_textual_inversion(row[0].clone(), token="<inverted>", text_encoder=encoder, tokenizer=tokenizer)
    sets = len(pipe._layers())
    pipe.load_cae_embeddings(as_dict(ContextAgnosticEmbeddings({name: row.expand(sets, -1, -1) for name, row in rows.items()})), adapter_name="own")
    pipe.set_cae_adapter("default_0")
    if sliced:
        pipe.enable_stream_slicing()
    close(latents_of(pipe, host_prompt="a <own> in the snow"), latents_of(pipe, host_prompt="a <inverted> in the snow"))


def test_every_layer_sees_its_own_embedding_in_the_host_prompt():
    """Against stock's text encoder with each layer's vectors as a token, and textbook attention."""
    pipe = loaded("sd")
    prompts, names = ["a <default_0> in the snow", "a red <default_0>"], [layer.name for layer in pipe._layers()]
    made = pipe(
        ["a dog"] * 2, host_prompt=prompts, guidance_scale=0.0, fidelity_guidance_scale=0.0, host_guidance_scale=1.0, num_inference_steps=1,
        output_type="latent", latents=noise(2),
    ).images  # fmt: skip
    contexts, tokenizer, weight = [], pipe.tokenizer, pipe.text_encoder.get_input_embeddings().weight
    tokens = pipe.active_cae.num_tokens
    kept = weight.data.clone()
    for row in pipe.active_cae.embeddings["text_encoder"]:
        weight.data[200 : 200 + tokens] = row
        ids = []
        for prompt in prompts:
            before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in prompt.split("<default_0>"))
            ids.append([0, *before, *range(200, 200 + tokens), *after, 1] + [1] * 32)
        with torch.no_grad():
            contexts.append(pipe.text_encoder(torch.tensor([i[:32] for i in ids]))[0])
        weight.data.copy_(kept)
    recorders = {name: RecordingAttention(context) for name, context in zip(names, contexts, strict=True)}
    own = {name: pipe.unet.get_submodule(name).processor for name in names}
    for name, recorder in recorders.items():
        pipe.unet.get_submodule(name).processor = recorder
    pipe.scheduler.set_timesteps(1)
    with torch.no_grad():
        predicted = pipe.unet(noise(2), pipe.scheduler.timesteps[0], torch.zeros(2, 32, 32)).sample
    close(made, pipe.scheduler.step(predicted, pipe.scheduler.timesteps[0], noise(2)).prev_sample)
    for name, processor in own.items():
        pipe.unet.get_submodule(name).processor = processor


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_in_the_host_prompt_work_with_everything_else(family):
    """Several images of several prompts equal single ones, with a denoiser of the host's own."""
    pipe = loaded(family)
    side = pipe._denoiser.config.sample_size
    shared = dict(num_inference_steps=2, output_type="latent", **{FAMILIES[family][3]: fine_tuned(pipe._denoiser)})
    hosts, latents = ["a <default_0> in the snow", "a red <default_0>"], noise(4, side=side)
    together = pipe(["a dog", "a cat"], host_prompt=hosts, num_images_per_prompt=2, latents=latents, **shared).images
    for i, prompt in enumerate(["a dog", "a dog", "a cat", "a cat"]):
        alone = pipe(prompt, host_prompt=hosts[i // 2], latents=latents[i : i + 1], **shared).images
        close(alone[0], together[i])


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_embeddings_in_the_host_prompt_beside_prompt_embeddings_of_another_length(family):
    """Each stream on its own, which no wrapper shares with another, is the same."""
    pipe = loaded(family)
    names = ["prompt_embeds", "negative_prompt_embeds"] + ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"] * (family == "sdxl")
    encoded = dict(zip(names, pipe.encode_prompt(["a dog in the snow", "a cat"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)))
    for name in names[:2]:
        encoded[name] = encoded[name].repeat(1, 2, 1)
    latents = noise(2, side=pipe.unet.config.sample_size)
    shared = dict(host_prompt=["a <default_0> in the snow", "a red <default_0>"], num_inference_steps=2, output_type="latent", latents=latents, **encoded)
    together = pipe(**shared).images
    pipe.enable_stream_slicing()
    close(together, pipe(**shared).images)


def test_errors_of_embeddings_in_the_host_prompt():
    pipe = loaded("sdxl")
    pipe.load_cae_embeddings(as_dict(random_cae(pipe)), adapter_name="cat")
    for prompts in (["a <default_0>", "a dog"], ["a <default_0>", "a <cat>"], ["a <default_0> and a <cat>"] * 2):
        with pytest.raises(ValueError, match="one and the same adapter"):
            pipe(["a dog", "a dog"], host_prompt=prompts, num_inference_steps=1)
    with pytest.raises(ValueError, match="leave .*host_prompt_2.* out"):
        latents_of(pipe, host_prompt="a <cat>", host_prompt_2="a dog")
    with pytest.raises(ValueError, match="'<cat>' with its 3 tokens does not fit into the 32"):
        latents_of(pipe, host_prompt="dog " * 29 + "<cat>")


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


# --- training them ---


def host_flags(base, photos, output, method, **options) -> list[str]:
    options = {
        "method": method, "pretrained_model_name_or_path": base, "instance_data_dir": photos, "output_dir": output, "class_noun": "dog",
        "max_train_steps": 4, "train_batch_size": 2, "report_to": "none", "augmentation_variants": 2,
    } | options  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for family, (stock, *_) in FAMILIES.items():
        folders[family] = tmp_path_factory.mktemp(family)
        stock().save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (90, 70), colour).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("family, method", [("sd", "ti"), ("sdxl", "ti"), ("sd", "dti"), ("sd", "lora"), ("sdxl", "lora"), ("sd3", "lora"), ("sd", "dreambooth")])
def test_stock_pipelines_load_what_is_trained(bases, photos, tmp_path, family, method):
    """And see the subject in it: pictures change, by what was learned."""
    options = {"max_sequence_length": 20, "optimizer": "adamw", "learning_rate": 1e-2} if family == "sd3" else {}
    train_host(host_flags(bases[family], photos, tmp_path, method, resolution=64, num_tokens=2, **options))
    stock = FAMILIES[family][0]()
    before = stock_latents(stock, "a photo of sks dog")
    after = before
    if method in ("ti", "dti"):
        stock.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors", token="<subject>") if family == "sd" else load_both(stock, tmp_path)
        before = stock_latents(stock, "a dog")
        after = stock_latents(stock, "a <subject>")
        assert stock.tokenizer.convert_tokens_to_ids("<subject>_1") == len(stock.tokenizer) - 1, "two vectors"
    elif method == "lora":
        stock.load_lora_weights(tmp_path)
        after = stock_latents(stock, "a photo of sks dog")
    else:
        stock.unet = type(stock.unet).from_pretrained(tmp_path / "unet")
        after = stock_latents(stock, "a photo of sks dog")
    assert torch.isfinite(after).all() and not torch.allclose(after, before, atol=1e-4)


def load_both(stock, folder) -> None:
    """As diffusers' documentation loads a textual inversion on SDXL."""
    state = load_file(folder / "learned_embeds.safetensors")
    stock.load_textual_inversion(state["clip_l"], token="<subject>", text_encoder=stock.text_encoder, tokenizer=stock.tokenizer)
    stock.load_textual_inversion(state["clip_g"], token="<subject>", text_encoder=stock.text_encoder_2, tokenizer=stock.tokenizer_2)


def stock_latents(pipe, prompt: str) -> torch.Tensor:
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return pipe(prompt, num_inference_steps=2, output_type="latent", latents=noise(side=denoiser.config.sample_size)).images


@pytest.mark.parametrize("method", ["ti", "dti", "lora", "dreambooth"])
def test_losses_are_the_references(bases, photos, tmp_path, method):
    """The plain denoising loss under the method's own prompt, with the new vectors where the placeholder stands."""
    args = parse_host_args(host_flags(bases["sd"], photos, tmp_path, method, num_tokens=2), METHODS)
    backbone = load_backbone(str(bases["sd"]), None, None, torch.float32, "cpu")
    backbone.configure(args)
    learner = METHODS[method](backbone, args)
    stock = tiny_stock()
    with torch.no_grad():
        for parameter in learner.learned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        if method in ("ti", "dti"):
            word = "<s0> <s1>"
            stock.tokenizer.add_tokens(["<s0>", "<s1>"])
            stock.text_encoder.resize_token_embeddings(len(stock.tokenizer))
            stock.text_encoder.get_input_embeddings().weight[-2:] = learner.learned()["text_encoder"][0]
            prompts = [TEMPLATES[np.random.default_rng((0, 3, e)).integers(len(TEMPLATES))].format(word) for e in (4, 5)]
        else:
            prompts = ["a photo of sks dog"] * 2
            stock.unet = copy.deepcopy(backbone.denoiser)
    batch = Batch(latents=noise(2), noise=noise(2, seed=9), timesteps=torch.tensor([100, 700]), masks=None, sizes=torch.zeros(2, 6))
    with learner.conditioned(range(4, 6)) as condition:
        loss = learner.loss(condition, batch)
        loss.backward()
    with torch.no_grad():
        ids = stock.tokenizer(prompts, padding="max_length", max_length=32, return_tensors="pt").input_ids
        noisy = stock.scheduler.add_noise(batch.latents * stock.vae.config.scaling_factor, batch.noise, batch.timesteps)
        expected = (stock.unet(noisy, batch.timesteps, stock.text_encoder(ids)[0]).sample - batch.noise).square().mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    assert sum(float(p.grad.abs().sum()) for p in learner.learned.parameters() if p.requires_grad) > 0
    untouched = [p for p in backbone.denoiser.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in untouched)
    assert bool(untouched) == (method != "dreambooth")


def test_directional_inversion_keeps_the_vocabularys_length(bases, photos, tmp_path):
    train_host(host_flags(bases["sd"], photos, tmp_path, "dti", resolution=64, num_tokens=2))
    vectors = load_file(tmp_path / "learned_embeds.safetensors")["<subject>"]
    words = tiny_stock().text_encoder.get_input_embeddings().weight.detach()
    torch.testing.assert_close(vectors.norm(dim=1), words.norm(dim=1).mean().expand(2))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_loss_of_p_plus_is_textual_inversions_where_all_layers_agree(bases, photos, tmp_path, family):
    """And every layer's vectors are learned."""
    batch = Batch(latents=noise(2, 32), noise=noise(2, 32, seed=9), timesteps=torch.tensor([100, 700]), masks=None, sizes=torch.full((2, 6), 64.0))
    losses = {}
    for method in ("ti", "p_plus"):
        args = parse_host_args(host_flags(bases[family], photos, tmp_path, method, num_tokens=2), METHODS)
        backbone = load_backbone(str(bases[family]), None, None, torch.float32, "cpu")
        backbone.configure(args)
        learner = METHODS[method](backbone, args)
        with torch.no_grad():
            for name, rows in learner.learned().items():
                rows.add_(torch.randn(1, *rows.shape[1:], generator=torch.Generator().manual_seed(len(name))))
        with learner.conditioned(range(4, 6)) as condition:
            losses[method] = learner.loss(condition, batch)
            losses[method].backward()
    torch.testing.assert_close(losses["p_plus"], losses["ti"], rtol=1e-4, atol=1e-5)
    assert all(len(rows) > 1 and rows.grad.abs().amax((1, 2)).min() > 0 for rows in learner.learned().values())


@pytest.mark.parametrize("method", ["p_plus", "ti", "lora", "dreambooth"])
def test_validation_pictures(bases, photos, tmp_path, method):
    prompt = "a <subject> in the snow" if method in ("ti", "p_plus") else "a photo of sks dog"
    train_host(host_flags(bases["sd"], photos, tmp_path, method, resolution=64, max_train_steps=1, validation_prompt=prompt, num_validation_images=1))
    assert (tmp_path / "validation" / "step-000001-0.png").is_file()


def test_p_plus_loads_as_a_host(bases, photos, tmp_path):
    train_host(host_flags(bases["sd"], photos, tmp_path, "p_plus", resolution=64))
    pipe = loaded("sd")
    pipe.load_cae_embeddings(tmp_path, adapter_name="my-dog")
    pipe.set_cae_adapter("default_0")
    assert not torch.allclose(latents_of(pipe, host_prompt="a <my-dog> in the snow"), latents_of(pipe, host_prompt="a dog in the snow"), atol=1e-4)


@pytest.mark.parametrize("method", ["ti", "p_plus", "lora", "dreambooth"])
def test_a_resumed_run_equals_an_uninterrupted_one(bases, photos, tmp_path, method):
    shared = {"resolution": 64, "checkpointing_steps": 2}
    train_host(host_flags(bases["sd"], photos, tmp_path / "whole", method, **shared))
    train_host(host_flags(bases["sd"], photos, tmp_path / "parts", method, **shared | {"max_train_steps": 2}))
    train_host(host_flags(bases["sd"], photos, tmp_path / "parts", method, **shared, resume_from_checkpoint="latest"))
    name = {"ti": "learned_embeds.safetensors", "p_plus": "cae_embeddings.safetensors", "lora": "pytorch_lora_weights.safetensors", "dreambooth": "unet/diffusion_pytorch_model.safetensors"}[method]
    whole, parts = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_defaults_are_the_papers():
    flags = ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "y", "--class_noun", "dog", "--method"]
    found = {method: parse_host_args([*flags, method], METHODS) for method in METHODS}
    assert (found["ti"].max_train_steps, found["ti"].train_batch_size, found["ti"].scale_lr) == (3000, 8, False)
    assert (found["dti"].max_train_steps, found["dti"].train_batch_size, METHODS["dti"].learning_rate) == (800, 4, 1e-2)
    assert (found["p_plus"].max_train_steps, found["p_plus"].train_batch_size, METHODS["p_plus"].learning_rate) == (500, 8, 1e-3)
    assert (found["dreambooth"].max_train_steps, found["dreambooth"].train_batch_size) == (800, 1)
    assert (found["lora"].max_train_steps, found["lora"].train_batch_size, found["lora"].rank) == (800, 4, 8)
    assert (METHODS["ti"].learning_rate, METHODS["dreambooth"].learning_rate) == (5e-3, 5e-4)


@pytest.mark.parametrize("method, message", [("ti", "use `--method lora` there"), ("p_plus", "SD 3 has no layers")])
def test_methods_that_sd3_does_not_have_are_refused(bases, photos, tmp_path, method, message):
    with pytest.raises(ValueError, match=message):
        train_host(host_flags(bases["sd3"], photos, tmp_path, method))
