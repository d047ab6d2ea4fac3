"""MS-Diffusion, with random weights of the true shapes: against textbook attention over the pictures' tokens, in their boxes."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from conftest import DIM, DIM_2, close, latents_of, noise, with_subject
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from degu.pipelines.hosts import MSAdapter, MSDiffusion
from degu.pipelines.hosts.convert_ms_diffusion import converted

QUERIES, DUMMIES, WIDTH, IMAGE_DIM = 3, 4, 128, 20
TEXT_DIM = DIM + DIM_2
BOXES = [(0.0, 0.25, 0.4, 0.8), (0.5, 0.0, 1.0, 1.0)]
SCALES = dict(guidance_scale=3.0, fidelity_guidance_scale=2.0, host_guidance_scale=2.0)


def published(unet) -> dict:
    """As `ms_adapter.bin` has it: MS-Diffusion's own names, one number for every attention processor, self-attention's too."""
    generator = torch.Generator().manual_seed(11)

    def random(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    grounding = DIM + 8 * 8
    shapes = {"latent_proj.0": (2 * grounding, grounding), "latent_proj.2": (QUERIES * WIDTH, 2 * grounding), "proj_in": (WIDTH, IMAGE_DIM), "proj_out": (TEXT_DIM, WIDTH)}
    image_proj = {f"{name}.weight": random(*shape) for name, shape in shapes.items()} | {f"{name}.bias": random(shape[0]) for name, shape in shapes.items()}
    image_proj["grounding_latents"] = random(1, QUERIES, WIDTH)
    for norm, size in (("latent_norm", WIDTH), ("attention_norm", WIDTH), ("norm_out", TEXT_DIM)):
        image_proj |= {f"{norm}.weight": 1 + random(size), f"{norm}.bias": random(size)}
    for i in range(2):
        image_proj |= {f"layers.{i}.{name}.{kind}": random(WIDTH) + (kind == "weight") for name in ("0.norm1", "0.norm2", "1.0") for kind in ("weight", "bias")}
        for name, shape in {"0.to_q": (WIDTH, WIDTH), "0.to_kv": (2 * WIDTH, WIDTH), "0.to_out": (WIDTH, WIDTH), "1.1": (4 * WIDTH, WIDTH), "1.3": (WIDTH, 4 * WIDTH)}.items():
            image_proj[f"layers.{i}.{name}.weight"] = random(*shape)
    adapter = {}
    for number, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        if attention.is_cross_attention:
            adapter |= {f"{number}.to_{kind}_ip.weight": 3 * random(attention.to_k.out_features, TEXT_DIM) for kind in "kv"}
    return {"image_proj": image_proj, "ms_adapter": adapter, "dummy_image_tokens": torch.nn.Parameter(random(1, DUMMIES, TEXT_DIM))}


@pytest.fixture
def saved():
    """What was published, and what is made of it."""
    pipe = with_subject("sdxl")
    weights = published(pipe.unet)
    return pipe, weights, MSAdapter(converted(weights))


def test_the_script(saved, tmp_path):
    pipe, weights, adapter = saved
    torch.save(weights, tmp_path / "ms_adapter.bin")
    command = [sys.executable, "-m", "degu.pipelines.hosts.convert_ms_diffusion", str(tmp_path / "ms_adapter.bin"), str(tmp_path / "ms_adapter.safetensors")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    state, expected = MSAdapter.from_file(tmp_path / "ms_adapter.safetensors").state_dict(), adapter.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(3)
    config = CLIPVisionConfig(hidden_size=IMAGE_DIM, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56, projection_dim=8)
    return CLIPVisionModelWithProjection(config).eval()


def host_of(adapter, count: int = 2, **options) -> MSDiffusion:
    images = [Image.effect_noise((60 + i, 50), 80.0 * (i + 1)).convert("RGB") for i in range(count)]
    torch.manual_seed(0)
    return MSDiffusion(adapter, image_encoder(), images, ["dog", "cat"][:count], BOXES[:count], **options)


def norm(x, weights, name):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def reference_resampling(weights, states, phrase, box):
    """One picture's tokens (queries, dim), from MS-Diffusion's own weights."""
    features = [function(box[c] * 100 ** (f / 8)) for f in range(8) for function in (math.sin, math.cos) for c in range(4)]
    x = weights["latent_proj.0.weight"] @ torch.cat([phrase, torch.tensor(features)]) + weights["latent_proj.0.bias"]
    x = weights["latent_proj.2.weight"] @ torch.nn.functional.gelu(x) + weights["latent_proj.2.bias"]
    latents = norm(x.view(QUERIES, WIDTH), weights, "latent_norm")
    states = states @ weights["proj_in.weight"].T + weights["proj_in.bias"]
    for i in range(2):
        def layer(name):
            return weights[f"layers.{i}.{name}.weight"]

        own = norm(latents, weights, f"layers.{i}.0.norm2")
        everything = torch.cat([norm(states, weights, f"layers.{i}.0.norm1"), own])
        heads = []
        for h in range(WIDTH // 64):
            part = slice(64 * h, 64 * (h + 1))
            q, k, v = own @ layer("0.to_q")[part].T, everything @ layer("0.to_kv")[part].T, everything @ layer("0.to_kv")[WIDTH:][part].T
            heads.append(torch.softmax(q @ k.T / 8, 1) @ v)
        latents = latents + torch.cat(heads, 1) @ layer("0.to_out").T
        latents = latents + torch.nn.functional.gelu(norm(latents, weights, f"layers.{i}.1.0") @ layer("1.1").T) @ layer("1.3").T
    latents = norm(latents, weights, "attention_norm") @ weights["proj_out.weight"].T + weights["proj_out.bias"]
    return norm(latents, weights, "norm_out")


@torch.no_grad()
def test_the_resampler_is_the_references(saved):
    pipe, weights, adapter = saved
    host = host_of(adapter)
    made = host.tokens(pipe)[0]
    ids = pipe.tokenizer(["dog", "cat"], padding="max_length", return_tensors="pt").input_ids
    phrases = pipe.text_encoder(ids).pooler_output
    states = host.image_encoder(CLIPImageProcessor()(host.images, return_tensors="pt").pixel_values, output_hidden_states=True).hidden_states[-2]
    expected = [reference_resampling(weights["image_proj"], states[i], phrases[i], BOXES[i]) for i in range(2)]
    close(made, torch.cat([weights["dummy_image_tokens"][0], *expected]))


class TextAndPictures:
    """Textbook attention to the text, and to the tokens of the box that a pixel is in."""

    def __init__(self, tokens, to_k, to_v, scale, size):
        self.tokens, self.to_k, self.to_v, self.scale, self.size = tokens, to_k, to_v, scale, size

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        def heads(x):
            return x.reshape(len(x), x.shape[1], attn.heads, -1).permute(0, 2, 1, 3)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(encoder_hidden_states)), heads(attn.to_v(encoder_hidden_states))
        out = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), 3) @ v
        h, w = self.size
        for pixel in range(h * w):
            y, x = divmod(pixel, w)
            chosen = [i for i, (left, top, right, bottom) in enumerate(BOXES) if math.floor(left * w) <= x < math.ceil(right * w) and math.floor(top * h) <= y < math.ceil(bottom * h)]
            if chosen:
                seen = torch.cat([self.tokens[DUMMIES + i * QUERIES : DUMMIES + (i + 1) * QUERIES] for i in chosen])
                key, value = heads((seen @ self.to_k.T)[None]), heads((seen @ self.to_v.T)[None])
                weights = torch.softmax(q[:, :, pixel : pixel + 1] @ key.transpose(2, 3) / math.sqrt(q.shape[-1]), 3)
                out[:, :, pixel : pixel + 1] += self.scale * (weights @ value)
        return attn.to_out[0](out.permute(0, 2, 1, 3).flatten(2))


@pytest.mark.parametrize("height, width", [(128, 128), (128, 192)])
def test_the_host_alone_is_the_reference(saved, height, width):
    """Its prompt, its pictures in their boxes; at any aspect ratio."""
    pipe, weights, adapter = saved
    pipe.unload_cae_embeddings()
    host, size = host_of(adapter, scale=0.6), (height // 4, width // 4)
    start = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    made = pipe(
        "a mug", host=host, host_prompt="a dog and a cat", guidance_scale=0.0, host_guidance_scale=1.0, num_inference_steps=1, output_type="latent",
        latents=start, height=height, width=width,
    ).images  # fmt: skip
    with torch.no_grad():
        tokens = host.tokens(pipe)[0]
        embeds, _, pooled, _ = pipe.encode_prompt("a dog and a cat", device="cpu", do_classifier_free_guidance=False)
        for number, name in enumerate(pipe.unet.attn_processors):
            if f"{number}.to_k_ip.weight" in weights["ms_adapter"]:
                layer = next(layer for layer in pipe._layers() if f"{layer.name}.processor" == name)
                own = [weights["ms_adapter"][f"{number}.to_{kind}_ip.weight"] for kind in "kv"]
                layer.module.processor = TextAndPictures(tokens, *own, 0.6, layer.map_size(size))
        pipe.scheduler.set_timesteps(1)
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
        predicted = pipe.unet(start, pipe.scheduler.timesteps[0], embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    close(made, pipe.scheduler.step(predicted, pipe.scheduler.timesteps[0], start).prev_sample)


def test_the_other_streams_do_not_see_the_pictures(saved):
    """With pictures that add nothing, the host is its plain prompt; and pictures change what the host predicts."""
    pipe, _, adapter = saved
    plain = latents_of(pipe, host_prompt="a dog and a cat", **SCALES)
    close(latents_of(pipe, host=host_of(adapter, scale=0.0), host_prompt="a dog and a cat", **SCALES), plain)
    assert not torch.allclose(latents_of(pipe, host=host_of(adapter), host_prompt="a dog and a cat", **SCALES), plain, atol=1e-2)


def test_batches_slices_and_one_subject(saved):
    pipe, _, adapter = saved
    host = host_of(adapter, count=1)
    shared = dict(num_inference_steps=2, output_type="latent", host=host, **SCALES)
    together = pipe(["a dog", "a cat"], host_prompt=["a dog", "a red dog"], latents=noise(2, side=32), **shared).images
    close(pipe("a cat", host_prompt="a red dog", latents=noise(2, side=32)[1:], **shared).images[0], together[1])
    pipe.enable_stream_slicing()
    close(pipe(["a dog", "a cat"], host_prompt=["a dog", "a red dog"], latents=noise(2, side=32), **shared).images, together)


def test_errors(saved, tmp_path):
    pipe, weights, adapter = saved
    with pytest.raises(ValueError, match="there are 1 pictures, 2 phrases and 1 boxes"):
        MSDiffusion(adapter, image_encoder(), [Image.new("RGB", (8, 8))], ["dog", "cat"], [(0, 0, 1, 1)])
    with pytest.raises(ValueError, match="in 0..1; .* is none"):
        MSDiffusion(adapter, image_encoder(), [Image.new("RGB", (8, 8))], ["dog"], [(0.5, 0, 0.2, 1)])
    with pytest.raises(ValueError, match="is for SDXL; this is a StableDiffusionDeGuPipeline"):
        latents_of(with_subject("sd"), host=host_of(adapter), host_prompt="a dog")
    del adapter.to_k["3"]
    with pytest.raises(ValueError, match="for another U-Net"):
        latents_of(pipe, host=host_of(adapter), host_prompt="a dog")
    with pytest.raises(FileNotFoundError, match="nothing"):
        MSAdapter.from_file(tmp_path / "nothing.safetensors")
    torch.save(weights, tmp_path / "ms_adapter.bin")
    with pytest.raises(ValueError, match="not a readable safetensors file .* Convert"):
        MSAdapter.from_file(tmp_path / "ms_adapter.bin")
