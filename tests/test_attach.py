"""The examples that attach DeGu to other methods, as people start them, on files as these methods write them."""

from __future__ import annotations

import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import DIM, FAMILIES, ROOT, random_cae, with_subject
from PIL import Image
from safetensors.torch import save_file
from test_ms_diffusion import image_encoder, published
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from degu.pipelines.cae_file import save_cae
from degu.pipelines.hosts.convert_ms_diffusion import converted
from degu.training.train_host import main as train_host


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The three families' models and CAEs, and a picture."""
    folder = tmp_path_factory.mktemp("attach")
    for family, (stock, *_) in FAMILIES.items():
        pipe = stock()
        pipe.save_pretrained(folder / family)
        save_cae(random_cae(pipe), folder / f"{family}.safetensors", family)
    (folder / "photos").mkdir()
    Image.effect_noise((80, 70), 90.0).convert("RGB").save(folder / "photos" / "dog.png")
    return folder


@pytest.fixture
def attach(folder, tmp_path, monkeypatch):
    """Runs an example; its picture."""

    def attach(name: str, family: str, host_prompt: str, *options) -> np.ndarray:
        output = tmp_path / "degu.png"
        argv = [f"{name}.py", "--base", folder / family, "--cae", folder / f"{family}.safetensors", "--prompt", "a dog in the snow", "--host_prompt", host_prompt, "--steps", 2, "--output", output, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        monkeypatch.syspath_prepend(ROOT / "examples" / "attach")
        torch.manual_seed(0)
        runpy.run_path(str(ROOT / "examples" / "attach" / f"{name}.py"), run_name="__main__")
        return np.asarray(Image.open(output), float)

    return attach


def trained(folder, tmp_path, method: str, family: str, *options):
    output = tmp_path / method
    argv = ["--method", method, "--pretrained_model_name_or_path", folder / family, "--instance_data_dir", folder / "photos", "--class_noun", "dog", "--output_dir", output,
            "--max_train_steps", 2, "--train_batch_size", 1, "--learning_rate", 0.1, "--augmentation_variants", 1, "--report_to", "none", *options]  # fmt: skip
    train_host([str(word) for word in argv])
    return output


@pytest.mark.parametrize("example, method, family, prompt, option", [
    ("textual_inversion", "ti", "sd", "a <my-dog> in the snow", "--embeddings"),
    ("textual_inversion", "dti", "sdxl", "a <my-dog> in the snow", "--embeddings"),
    ("lora", "lora", "sd", "a sks dog in the snow", "--lora"),
    ("lora", "lora", "sdxl", "a sks dog in the snow", "--lora"),
    ("lora", "lora", "sd3", "a sks dog in the snow", "--lora"),
    ("dreambooth", "dreambooth", "sd", "a sks dog in the snow", "--denoiser"),
    ("core", "core", "sd", "a <my-dog> in the snow", "--core"),
    ("custom_diffusion", "custom_diffusion", "sd", "a <my-dog> dog in the snow", "--weights"),
    ("p_plus", "p_plus", "sd", "a <my-dog> in the snow", "--embeddings"),
    ("neti", "neti", "sd", "a <my-dog> in the snow", "--mapper"),
])  # fmt: skip
def test_what_train_host_writes(folder, tmp_path, attach, example, method, family, prompt, option):
    options = {"core": ("--unet_train_steps", 1), "lora": ("--optimizer", "adamw")}.get(method, ())
    host = trained(folder, tmp_path, method, family, *options, *(("--max_sequence_length", 20) if family == "sd3" else ()))
    file = {"dreambooth": host / "unet", "dti": host / "learned_embeds.safetensors"}.get(method, host)
    made = attach(example, family, prompt, option, file)
    assert made.shape == (128 if family == "sdxl" else 64,) * 2 + (3,)
    plain = attach("dreambooth", family, "a dog in the snow")  # the same without a host's weights
    assert np.abs(made - plain).mean() > 0.5


def resampler(dim: int) -> dict[str, torch.Tensor]:
    """IP-Adapter Plus, of the shapes that tell it from others."""
    width, generator = 64, torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    state = {"latents": random(1, 4, width), "proj_in.weight": random(width, DIM), "proj_in.bias": random(width), "proj_out.weight": random(dim, width), "proj_out.bias": random(dim)}
    state |= {"norm_out.weight": torch.ones(dim), "norm_out.bias": torch.zeros(dim)}
    for i in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            state |= {f"layers.{i}.{norm}.weight": torch.ones(width), f"layers.{i}.{norm}.bias": torch.zeros(width)}
        for name, shape in {"0.to_q": (width, width), "0.to_kv": (2 * width, width), "0.to_out": (width, width), "1.1": (4 * width, width), "1.3": (width, 4 * width)}.items():
            state[f"layers.{i}.{name}.weight"] = random(*shape)
    return state


def full_face(dim: int) -> dict[str, torch.Tensor]:
    return {"proj.0.weight": torch.randn(DIM, DIM), "proj.0.bias": torch.zeros(DIM), "proj.2.weight": torch.randn(dim, DIM), "proj.2.bias": torch.zeros(dim),
            "proj.3.weight": torch.ones(dim), "proj.3.bias": torch.zeros(dim)}  # fmt: skip


def plain(dim: int) -> dict[str, torch.Tensor]:
    return {"proj.weight": torch.randn(4 * dim, DIM), "proj.bias": torch.zeros(4 * dim), "norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim)}


@pytest.mark.parametrize("projection", [plain, resampler, full_face])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_ip_adapter(folder, tmp_path, attach, family, projection):
    unet = with_subject(family).unet
    torch.manual_seed(3)
    state = {f"image_proj.{name}": tensor for name, tensor in projection(unet.config.cross_attention_dim).items()}
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            size = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            state |= {f"ip_adapter.{number}.to_{kind}_ip.weight": torch.randn(size, unet.config.cross_attention_dim) for kind in "kv"}
            number += 2
    save_file(state, tmp_path / "ip-adapter.safetensors")
    config = CLIPVisionConfig(hidden_size=DIM, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56, projection_dim=DIM)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "image_encoder")
    made = attach("ip_adapter", family, "a dog in the snow", "--adapter", tmp_path, "--weight_name", "ip-adapter.safetensors", "--image", folder / "photos" / "dog.png", "--scale", 1)
    assert np.abs(made - attach("dreambooth", family, "a dog in the snow")).mean() > 0.5


def test_ms_diffusion(folder, tmp_path, attach):
    save_file({name: tensor.contiguous().clone() for name, tensor in converted(published(with_subject("sdxl").unet)).items()}, tmp_path / "ms.safetensors", {"format": "degu-ms-diffusion", "format_version": "1"})
    image_encoder().save_pretrained(tmp_path / "encoder")
    picture = folder / "photos" / "dog.png"
    made = attach(
        "ms_diffusion", "sdxl", "a dog and a cat", "--adapter", tmp_path / "ms.safetensors", "--image_encoder", tmp_path / "encoder", "--images", picture, picture,
        "--phrases", "dog", "cat", "--boxes", "0,0.2,0.5,1", "0.5,0,1,0.9",
    )  # fmt: skip
    assert np.abs(made - attach("dreambooth", "sdxl", "a dog and a cat")).mean() > 0.5


def test_examples_are_short():
    assert all(len(file.read_text().splitlines()) <= 40 for file in (ROOT / "examples" / "attach").glob("*.py"))
