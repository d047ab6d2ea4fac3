"""Training other personalization methods: their losses, their files, and that a run can be resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, latents_of, noise, tiny_stock, with_subject
from PIL import Image
from reference import RecordingAttention
from safetensors.torch import load_file

from degu.pipelines.hosts import NeTI
from degu.training.arguments import parse_host_args
from degu.training.backbones import load_backbone
from degu.training.hosts import METHODS
from degu.training.hosts.host_method import TEMPLATES
from degu.training.latent_cache import Batch
from degu.training.train_host import main as train_host

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


@pytest.mark.parametrize("family, method", [("sd", "ti"), ("sdxl", "ti"), ("sd", "dti"), ("sd", "lora"), ("sdxl", "lora"), ("sd3", "lora"), ("sd", "dreambooth"), ("sd", "custom_diffusion"), ("sd", "core")])
def test_stock_pipelines_load_what_is_trained(bases, photos, tmp_path, family, method):
    """And see the subject in it: pictures change, by what was learned."""
    options = {"max_sequence_length": 20, "optimizer": "adamw", "learning_rate": 1e-2} if family == "sd3" else {}
    if method == "custom_diffusion":
        options = {"learning_rate": 1e-2}
    if method == "core":
        options = {"unet_train_steps": 3, "unet_learning_rate": 1e-2, "unet_train_batch_size": 1}
    train_host(host_flags(bases[family], photos, tmp_path, method, resolution=64, num_tokens=2, **options))
    stock = FAMILIES[family][0]()
    before = stock_latents(stock, "a photo of sks dog")
    after = before
    if method in ("ti", "dti"):
        stock.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors", token="<subject>") if family == "sd" else load_both(stock, tmp_path)
        before = stock_latents(stock, "a dog")
        after = stock_latents(stock, "a <subject>")
        assert stock.tokenizer.convert_tokens_to_ids("<subject>_1") == len(stock.tokenizer) - 1, "two vectors"
    elif method in ("custom_diffusion", "core"):
        prompt = {"custom_diffusion": "a photo of a {} dog", "core": "a photo of a {}"}[method]
        stock.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors", token="<subject>")
        before = stock_latents(stock, prompt.format("<subject>"))
        if method == "core":
            stock.unet = type(stock.unet).from_pretrained(tmp_path / "fine_tuned" / "unet")
        else:
            stock.unet.load_attn_procs(tmp_path, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=stock)
        after = stock_latents(stock, prompt.format("<subject>"))
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


@pytest.mark.parametrize("method", ["ti", "lora", "dreambooth", "custom_diffusion"])
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
        if method in ("ti", "custom_diffusion"):
            word = with_tokens(stock, learner.embeddings()()["text_encoder"][0])
            prompts = [template_of(example).format(word) for example in (4, 5)]
        if method == "custom_diffusion":
            prompts = [f"a photo of a {word} dog"] * 2
            for layer, processor in zip(backbone.layers, learner.learned["weights"]):
                attention = stock.unet.get_submodule(layer.name)
                attention.to_k.weight.copy_(processor.to_k_custom_diffusion.weight)
                attention.to_v.weight.copy_(processor.to_v_custom_diffusion.weight)
        elif method != "ti":
            prompts = ["a photo of sks dog"] * 2
            stock.unet = copy.deepcopy(backbone.denoiser)
    batch = Batch(latents=noise(2), noise=noise(2, seed=9), timesteps=torch.tensor([100, 700]), masks=None, sizes=torch.zeros(2, 6))
    with learner.conditioned(range(4, 6), batch) as condition:
        loss = learner.loss(condition, batch)
        loss.backward()
    expected = denoising_loss(stock, prompts, batch)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    assert sum(float(p.grad.abs().sum()) for p in learner.learned.parameters() if p.requires_grad) > 0
    untouched = [p for p in backbone.denoiser.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in untouched)
    assert bool(untouched) == (method != "dreambooth")


def template_of(example: int) -> str:
    return TEMPLATES[np.random.default_rng((0, 3, example)).integers(len(TEMPLATES))]


@torch.no_grad()
def with_tokens(stock, vectors: torch.Tensor) -> str:
    """Gives the text encoder new tokens with these vectors; returns how they are written."""
    words = [f"<s{i}>" for i in range(len(vectors))]
    stock.tokenizer.add_tokens(words)
    stock.text_encoder.resize_token_embeddings(len(stock.tokenizer))
    stock.text_encoder.get_input_embeddings().weight[-len(vectors) :] = vectors
    return " ".join(words)


@torch.no_grad()
def encoded(stock, prompts: list[str]) -> torch.Tensor:
    return stock.text_encoder(stock.tokenizer(prompts, padding="max_length", max_length=32, return_tensors="pt").input_ids)[0]


@torch.no_grad()
def denoising_loss(stock, prompts: list[str], batch: Batch) -> torch.Tensor:
    noisy = stock.scheduler.add_noise(batch.latents * stock.vae.config.scaling_factor, batch.noise, batch.timesteps)
    return (stock.unet(noisy, batch.timesteps, encoded(stock, prompts)).sample - batch.noise).square().mean()


def learner_of(base, photos, tmp_path, method: str, **options):
    """The method on its backbone, its parameters moved away from where they start."""
    args = parse_host_args(host_flags(base, photos, tmp_path, method, **options), METHODS)
    backbone = load_backbone(str(base), None, None, torch.float32, "cpu")
    backbone.configure(args)
    learner = METHODS[method](backbone, args)
    with torch.no_grad():
        for parameter in learner.learned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return learner


def example_batch() -> Batch:
    return Batch(latents=noise(2), noise=noise(2, seed=9), timesteps=torch.tensor([100, 700]), masks=None, sizes=torch.zeros(2, 6))


def test_directional_inversions_prior(bases, photos, tmp_path):
    """Beside textual inversion's loss, kappa times the cosine to the class noun's embedding is to be large."""
    learner, stock, batch = learner_of(bases["sd"], photos, tmp_path, "dti", num_tokens=2), tiny_stock(), example_batch()
    vectors = learner.learned()["text_encoder"][0].detach()
    noun = stock.text_encoder.get_input_embeddings().weight[stock.tokenizer.convert_tokens_to_ids("dog</w>")].detach()
    learner.kappa = 100.0
    with learner.conditioned(range(4, 6), batch) as condition:
        loss = learner.loss(condition, batch).detach()
    word = with_tokens(stock, vectors)
    expected = denoising_loss(stock, [template_of(example).format(word) for example in (4, 5)], batch)
    torch.testing.assert_close(loss, expected - 100.0 * torch.cosine_similarity(vectors, noun[None]).sum(), rtol=1e-4, atol=1e-4)


def test_loss_of_neti(bases, photos, tmp_path):
    """Where values and keys see the same, and every layer and timestep the same token, it is textual inversion's."""
    learner, stock, batch = learner_of(bases["sd"], photos, tmp_path, "neti"), tiny_stock(), example_batch()
    with torch.no_grad():
        learner.learned.output_layer.weight.zero_()
        learner.learned.output_layer.bias[learner.learned.dim :] = 0  # of no direction, so nothing is added for the values
    vector = torch.nn.functional.normalize(learner.learned.output_layer.bias.detach(), dim=0) * learner.learned.norm
    with learner.conditioned(range(4, 6), batch) as condition:
        loss = learner.loss(condition, batch)
        loss.backward()
    word = with_tokens(stock, vector[None, : learner.learned.dim])
    torch.testing.assert_close(loss.detach(), denoising_loss(stock, [template_of(example).format(word) for example in (4, 5)], batch), rtol=1e-4, atol=1e-5)
    assert learner.learned.output_layer.bias.grad.abs().sum() > 0


def test_every_example_of_neti_has_its_own_timestep(bases, photos, tmp_path):
    """A batch's loss is the mean of single ones; nested dropout is each example's own."""
    learner, batch = learner_of(bases["sd"], photos, tmp_path, "neti"), example_batch()
    assert len({tuple(learner._kept(range(e, e + 1))) for e in range(20)}) > 5
    losses = []
    for examples, part in ((range(4, 6), slice(0, 2)), (range(4, 5), slice(0, 1)), (range(5, 6), slice(1, 2))):
        own = Batch(batch.latents[part], batch.noise[part], batch.timesteps[part], None, batch.sizes[part])
        with learner.conditioned(examples, own) as condition:
            losses.append(learner.loss(condition, own).detach())
    torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2, rtol=1e-4, atol=1e-5)


def test_losses_of_core(bases, photos, tmp_path):
    """Its Eq. 3 and 4, with one token for the subject and one for the noun, by stock's modules and textbook attention."""
    learner, stock, batch = learner_of(bases["sd"], photos, tmp_path, "core"), tiny_stock(), example_batch()
    contexts = ["a {} in the snow", "a red {} on the beach"]
    embedding, attention = learner.context_losses(contexts, batch)
    nouns = encoded(stock, [context.format("dog") for context in contexts])
    noun_ids = stock.tokenizer([context.format("dog") for context in contexts], padding="max_length", max_length=32, return_tensors="pt").input_ids
    others = noun_ids != stock.tokenizer.convert_tokens_to_ids("dog</w>")
    noisy = stock.scheduler.add_noise(batch.latents * stock.vae.config.scaling_factor, batch.noise, batch.timesteps)

    def mean_attention(states: torch.Tensor) -> torch.Tensor:
        recorders = {layer.name: RecordingAttention(states) for layer in learner.backbone.layers}
        for name, recorder in recorders.items():
            stock.unet.get_submodule(name).processor = recorder
        with torch.no_grad():
            stock.unet(noisy, batch.timesteps, states)
        return torch.cat([recorder.probabilities for recorder in recorders.values()], 1).mean(1)  # (n, pixels of all layers, length)

    own = encoded(stock, [context.format(with_tokens(stock, learner.learned()["text_encoder"][0].detach())) for context in contexts])
    torch.testing.assert_close(embedding.detach(), (1 - torch.cosine_similarity(own, nouns, dim=-1))[others].mean(), rtol=1e-4, atol=1e-6)
    expected = (mean_attention(own) - mean_attention(nouns)).square()[others].mean()
    torch.testing.assert_close(attention.detach(), expected, rtol=1e-3, atol=1e-9)
    (embedding + attention).backward()
    assert learner.learned.rows["text_encoder"].grad.abs().sum() > 0
    with learner.conditioned(range(4, 6), batch) as condition:
        learner._contexts = contexts  # instead of those that were drawn
        whole = learner.loss(condition, batch).detach()
    plain = tiny_stock()
    word = with_tokens(plain, learner.learned()["text_encoder"][0].detach())
    denoising = denoising_loss(plain, [template_of(example).format(word) for example in (4, 5)], batch)
    torch.testing.assert_close(whole, denoising + 1.5e-4 * embedding.detach() + 0.05 * attention.detach(), rtol=1e-4, atol=1e-5)


def test_cores_second_stage_is_not_resumed_under_other_vectors(bases, photos, tmp_path):
    shared = {"resolution": 64, "checkpointing_steps": 2, "unet_train_steps": 2}
    train_host(host_flags(bases["sd"], photos, tmp_path, "core", **shared))
    with pytest.raises(ValueError, match="other vectors .* Delete .*fine_tuned"):
        train_host(host_flags(bases["sd"], photos, tmp_path, "core", **shared | {"max_train_steps": 6, "resume_from_checkpoint": "latest"}))


def test_core_keeps_lengths_in_the_middle_of_the_steps(bases, photos, tmp_path):
    learner = learner_of(bases["sd"], photos, tmp_path, "core", max_train_steps=10)
    rows, changed = learner.learned()["text_encoder"], []
    for step in range(10):
        before = rows.norm()
        learner.before_step(step)
        rows.data += 0.1
        learner.after_step(step)
        changed.append(not torch.isclose(rows.norm(), before))
    assert changed == [True] * 4 + [False] * 2 + [True] * 4


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
        with learner.conditioned(range(4, 6), batch) as condition:
            losses[method] = learner.loss(condition, batch)
            losses[method].backward()
    torch.testing.assert_close(losses["p_plus"], losses["ti"], rtol=1e-4, atol=1e-5)
    assert all(len(rows) > 1 and rows.grad.abs().amax((1, 2)).min() > 0 for rows in learner.learned().values())


@pytest.mark.parametrize("method", ["p_plus", "ti", "neti", "lora", "dreambooth", "custom_diffusion"])
def test_validation_pictures(bases, photos, tmp_path, method):
    prompt = "a photo of sks dog" if method in ("lora", "dreambooth") else "a <subject> in the snow"
    train_host(host_flags(bases["sd"], photos, tmp_path, method, resolution=64, max_train_steps=1, validation_prompt=prompt, num_validation_images=1))
    assert (tmp_path / "validation" / "step-000001-0.png").is_file()


def test_neti_loads_as_a_host(bases, photos, tmp_path):
    train_host(host_flags(bases["sd"], photos, tmp_path, "neti", resolution=64))
    host = NeTI.from_file(tmp_path)
    assert not torch.allclose(latents_of(with_subject("sd"), host=host, host_prompt="a <subject>"), latents_of(with_subject("sd"), host_prompt="a dog"), atol=1e-4)


def test_p_plus_loads_as_a_host(bases, photos, tmp_path):
    train_host(host_flags(bases["sd"], photos, tmp_path, "p_plus", resolution=64))
    pipe = with_subject("sd")
    pipe.load_cae_embeddings(tmp_path, adapter_name="my-dog")
    pipe.set_cae_adapter("default_0")
    assert not torch.allclose(latents_of(pipe, host_prompt="a <my-dog> in the snow"), latents_of(pipe, host_prompt="a dog in the snow"), atol=1e-4)


@pytest.mark.parametrize("method", ["ti", "p_plus", "neti", "lora", "dreambooth", "custom_diffusion", "core"])
def test_a_resumed_run_equals_an_uninterrupted_one(bases, photos, tmp_path, method):
    shared = {"resolution": 64, "checkpointing_steps": 2, "unet_train_steps": 4}
    train_host(host_flags(bases["sd"], photos, tmp_path / "whole", method, **shared))
    train_host(host_flags(bases["sd"], photos, tmp_path / "parts", method, **shared | {"unet_train_steps" if method == "core" else "max_train_steps": 2}))
    train_host(host_flags(bases["sd"], photos, tmp_path / "parts", method, **shared, resume_from_checkpoint="latest"))
    name = {"ti": "learned_embeds.safetensors", "p_plus": "cae_embeddings.safetensors", "lora": "pytorch_lora_weights.safetensors", "dreambooth": "unet/diffusion_pytorch_model.safetensors",
            "neti": "neti_mapper.safetensors", "custom_diffusion": "pytorch_custom_diffusion_weights.safetensors", "core": "fine_tuned/unet/diffusion_pytorch_model.safetensors"}[method]  # fmt: skip
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
    assert (found["neti"].max_train_steps, found["neti"].train_batch_size, METHODS["neti"].learning_rate) == (1000, 8, 1e-3)
    assert (found["core"].max_train_steps, found["core"].train_batch_size, METHODS["core"].learning_rate) == (300, 6, 5e-3)
    assert (found["core"].unet_train_steps, found["core"].unet_train_batch_size, found["core"].unet_learning_rate) == (1000, 4, 2e-6)
    assert (METHODS["ti"].learning_rate, METHODS["dreambooth"].learning_rate) == (5e-3, 5e-4)


@pytest.mark.parametrize("method, message", [("ti", "is for models of"), ("neti", "is for models of"), ("p_plus", "this one is 'sd3'")])
def test_methods_that_sd3_does_not_have_are_refused(bases, photos, tmp_path, method, message):
    with pytest.raises(ValueError, match=message):
        train_host(host_flags(bases["sd3"], photos, tmp_path, method))
