"""Other personalization methods in a stream of their own: their weights act there, and nowhere else unless asked to."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from conftest import DIM, DIM_2, FAMILIES, ROOT, as_dict, close, latents_of, load_random_ip_adapter, load_random_ip_adapter_3, noise, random_cae, tiny_stock, with_subject
from peft import LoraConfig, inject_adapter_in_model
from reference import RecordingAttention, reference_latents
from safetensors.torch import load_file, save_file

from degu.pipelines import StableDiffusionDeGuPipeline
from degu.pipelines.cae_file import ContextAgnosticEmbeddings
from degu.pipelines.hosts import Host, HostCondition


def with_lora(module: torch.nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    module.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))


def fine_tuned(module: torch.nn.Module) -> torch.nn.Module:
    """The denoiser that `with_lora` amounts to, as a model of its own."""
    tuned = copy.deepcopy(module)
    with_lora(tuned)
    tuned.fuse_lora()
    return tuned


@pytest.mark.parametrize("start", [None, 0.25])
def test_the_hosts_own_denoiser_is_the_references(start):
    pipe = with_subject("sd")
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
    bare, with_adapter = with_subject(family), with_subject(family, with_lora)
    tuned = fine_tuned(bare._denoiser)
    all_tuned = with_subject(family, lambda module: (with_lora(module), module.fuse_lora()))
    if sliced:
        for pipe in (bare, with_adapter):
            pipe.enable_stream_slicing()
    alone = latents_of(with_adapter, host_prompt="a red dog", host_weights="host")
    close(alone, latents_of(bare, host_prompt="a red dog", **{FAMILIES[family][3]: tuned}))
    everywhere = latents_of(with_adapter, host_prompt="a red dog")
    close(everywhere, latents_of(all_tuned, host_prompt="a red dog"))
    assert not torch.allclose(alone, everywhere, atol=1e-2)
    assert not torch.allclose(alone, latents_of(bare, host_prompt="a red dog"), atol=1e-2)


@pytest.mark.parametrize("family, kind", [*((family, kind) for family in FAMILIES for kind in ("weights", "picture")), ("sd", "tokens"), ("sdxl", "tokens")])
def test_the_host_alone_is_stocks_pipeline_with_that_host(family, kind):
    """Bit for bit, at w_e = w_f = 0 and w_h = stock's scale."""
    pipe, prompt, picture = with_subject(family, with_lora if kind == "weights" else lambda module: None), "a dog in the snow", {}
    if kind == "tokens":
        prompt = "a <my-dog> in the snow"
        for i, (encoder, tokenizer) in enumerate(pipe._text_encoders().values()):
            pipe.load_textual_inversion(torch.randn(2, (DIM, DIM_2)[i]), token="<my-dog>", text_encoder=encoder, tokenizer=tokenizer)
    if kind == "picture" and family == "sd3":
        load_random_ip_adapter_3(pipe)
        picture = {"ip_adapter_image_embeds": torch.randn(2, 4, 6)}
    elif kind == "picture":
        load_random_ip_adapter(pipe)
        picture = {"ip_adapter_image_embeds": [torch.randn(2, 1, DIM)]}
    shared = dict(num_inference_steps=3, output_type="latent", latents=noise(side=pipe._denoiser.config.sample_size), fidelity_guidance_scale=0.0, **picture)
    expected = pipe(prompt, guidance_scale=4.0, **shared).images
    made = pipe("something else", host_prompt=prompt, guidance_scale=0.0, host_guidance_scale=4.0, **shared).images
    assert torch.equal(made, expected)
    assert not torch.allclose(made, with_subject(family)("a dog in the snow", guidance_scale=4.0, **{**shared, "ip_adapter_image_embeds": None}).images, atol=1e-3)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_host_pictures_own_mask(family):
    """`ip_adapter_masks`: the host alone is stock's pipeline bit for bit, and the mask still says where the picture acts under DeGu."""
    pipe = with_subject(family)
    load_random_ip_adapter(pipe)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    picture = {"ip_adapter_image_embeds": [torch.randn(2, 1, DIM)]}
    masked = picture | {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
    expected = latents_of(pipe, guidance_scale=4.0, fidelity_guidance_scale=0.0, **masked)
    alone = latents_of(pipe, host_prompt="a dog in the snow", guidance_scale=0.0, host_guidance_scale=4.0, fidelity_guidance_scale=0.0, **masked)
    assert torch.equal(alone, expected)
    assert not torch.allclose(latents_of(pipe, host_prompt="a dog", **masked), latents_of(pipe, host_prompt="a dog", **picture), atol=1e-3)


def test_adapters_are_as_before():
    pipe = with_subject("sd", with_lora)
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
    bare, pipe = with_subject("sd"), with_subject("sd")
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), pipe.text_encoder)
    host = pipe.encode_prompt("a red dog", "cpu", 1, False)[0]
    close(latents_of(pipe, host_prompt="a red dog", host_weights="host"), latents_of(bare, host_prompt_embeds=host))


# --- embeddings inside the host prompt (P+) ---


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("sliced", [False, True])
def test_one_embedding_for_all_layers_is_a_textual_inversion(family, sliced):
    pipe = with_subject(family)
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
    pipe = with_subject("sd")
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
    pipe = with_subject(family)
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
    pipe = with_subject(family)
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
    pipe = with_subject("sdxl")
    pipe.load_cae_embeddings(as_dict(random_cae(pipe)), adapter_name="cat")
    for prompts in (["a <default_0>", "a dog"], ["a <default_0>", "a <cat>"], ["a <default_0> and a <cat>"] * 2):
        with pytest.raises(ValueError, match="one and the same adapter"):
            pipe(["a dog", "a dog"], host_prompt=prompts, num_inference_steps=1)
    with pytest.raises(ValueError, match="leave .*host_prompt_2.* out"):
        latents_of(pipe, host_prompt="a <cat>", host_prompt_2="a dog")
    with pytest.raises(ValueError, match="'<cat>' with its 3 tokens does not fit into the 32"):
        latents_of(pipe, host_prompt="dog " * 29 + "<cat>")


def test_errors():
    pipe = with_subject("sd", with_lora)
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


class ScalingHost(Host):
    """Makes the convolution at the end twice as strong while it is in use, and notes what happens."""

    apart = True

    def __init__(self, unet) -> None:
        self.weight, self.events = unet.conv_out.weight, []

    def encode(self, pipe, texts, stock):
        self.events.append("encode")
        return HostCondition(pipe.encode_prompt(texts["prompt"], "cpu", stock["num_images_per_prompt"], False)[0])

    @contextlib.contextmanager
    def left_out(self):
        self.events.append("left out")
        try:
            yield
        finally:
            self.events.append("back")

    @contextlib.contextmanager
    def in_use(self):
        self.events.append("in use")
        self.weight.data.mul_(2)
        try:
            yield
        finally:
            self.weight.data.div_(2)


@pytest.mark.parametrize("sliced", [False, True])
def test_a_host_that_changes_the_model(sliced):
    """Its rows alone see the change; the same as a denoiser of its own that is changed."""
    pipe = with_subject("sd")
    if sliced:
        pipe.enable_stream_slicing()
    host, tuned = ScalingHost(pipe.unet), copy.deepcopy(pipe.unet)
    tuned.conv_out.weight.data.mul_(2)
    close(latents_of(pipe, host=host, host_prompt="a red dog"), latents_of(pipe, host_prompt="a red dog", host_unet=tuned))
    assert host.events == ["left out", "in use", "encode", "in use", "in use", "in use", "back"]
    host.events.clear()

    def stop(pipe, i, t, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents_of(pipe, host=host, host_prompt="a red dog", callback_on_step_end=stop)
    assert host.events[-1] == "back"


def test_the_readmes_host():
    """As it is written there; it is what the same embeddings are without a class for it."""
    code = (ROOT / "README.md").read_text().split("<!-- a host -->\n```python\n")[1].split("```")[0]
    pipe, shared = with_subject("sd"), {"num_inference_steps": 2}
    scope = {"pipe": lambda *args, **kwargs: pipe(*args, **kwargs, **shared, latents=noise())}
    exec(code, scope)
    embeds = [pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in ("a dog in the snow", "a wolf in the snow")]
    expected = pipe("a dog in the snow", host_prompt_embeds=sum(embeds) / 2, latents=noise(), **shared).images[0]
    assert scope["image"].tobytes() == expected.tobytes()


# --- Custom Diffusion ---


def custom_diffusion_file(unet: torch.nn.Module, folder) -> dict[str, torch.Tensor]:
    """Random keys and values for all cross-attention, in diffusers' format; returns them by layer."""
    generator, weights, entries = torch.Generator().manual_seed(7), {}, {}
    for name in unet.attn_processors:
        layer = name.removesuffix(".processor")
        attention = unet.get_submodule(layer)
        if layer.endswith("attn2"):
            weights[layer] = [0.3 * torch.randn(attention.to_k.weight.shape, generator=generator) for _ in range(2)]
            entries |= {f"{name}.to_{kind}_custom_diffusion.weight": weight for kind, weight in zip("kv", weights[layer])}
        else:
            entries[name] = {}
    torch.save(entries, folder / "pytorch_custom_diffusion_weights.bin")
    return weights


@pytest.fixture
def customised(tmp_path):
    """A pipeline with Custom Diffusion loaded as its users load it, one without, and the denoiser that it amounts to."""
    bare, pipe = with_subject("sd"), with_subject("sd")
    weights = custom_diffusion_file(pipe.unet, tmp_path)
    pipe.unet.load_attn_procs(tmp_path, weight_name="pytorch_custom_diffusion_weights.bin", _pipeline=pipe)
    tuned = copy.deepcopy(bare.unet)
    with torch.no_grad():
        for layer, (keys, values) in weights.items():
            tuned.get_submodule(layer).to_k.weight.copy_(keys)
            tuned.get_submodule(layer).to_v.weight.copy_(values)
    return bare, pipe, tuned


@pytest.mark.parametrize("sliced", [False, True])
def test_custom_diffusion_acts_in_the_host_stream_alone(customised, sliced):
    bare, pipe, tuned = customised
    if sliced:
        pipe.enable_stream_slicing()
    processors = dict(pipe.unet.attn_processors)
    alone = latents_of(pipe, host_prompt="a red dog", host_weights="host")
    close(alone, latents_of(bare, host_prompt="a red dog", host_unet=tuned))
    assert pipe.unet.attn_processors == processors
    assert not torch.allclose(alone, latents_of(bare, host_prompt="a red dog"), atol=1e-2)


def test_custom_diffusion_for_all_streams(customised):
    """Masks too are read with its keys."""
    bare, pipe, tuned = customised
    everywhere = latents_of(pipe, host_prompt="a red dog")
    bare.unet = tuned
    close(everywhere, latents_of(bare, host_prompt="a red dog"))


def test_custom_diffusion_alone_is_stocks_pipeline_with_it(customised):
    _, pipe, _ = customised
    expected = latents_of(pipe, fidelity_guidance_scale=0.0, guidance_scale=4.0)
    made = pipe(
        "something else", host_prompt="a dog in the snow", guidance_scale=0.0, fidelity_guidance_scale=0.0, host_guidance_scale=4.0,
        num_inference_steps=3, output_type="latent", latents=noise(),
    ).images  # fmt: skip
    assert torch.equal(made, expected)


# --- loading and unloading ---


@pytest.mark.parametrize("kind", ["diffusers", "a1111", "kohya"])
def test_textual_inversion_files(tmp_path, kind):
    vectors = torch.randn(2, DIM, generator=torch.Generator().manual_seed(4))
    file = tmp_path / ("my-dog.pt" if kind == "a1111" else "my-dog.safetensors")
    if kind == "a1111":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "my-dog", "step": 100, "sd_checkpoint": None}, file)
    else:
        save_file({"emb_params" if kind == "kohya" else "<my-dog>": vectors}, file)
    pipe, expected = with_subject("sd"), with_subject("sd")
    pipe.load_textual_inversion(tmp_path, weight_name=file.name, token="<my-dog>")
    expected.load_textual_inversion(vectors.clone(), token="<my-dog>")
    assert torch.equal(latents_of(pipe, host_prompt="a <my-dog>"), latents_of(expected, host_prompt="a <my-dog>"))
    assert not torch.allclose(latents_of(pipe, host_prompt="a <my-dog>"), latents_of(pipe, host_prompt="a dog"), atol=1e-2)


def test_textual_inversion_files_for_sdxl(tmp_path):
    """kohya's, and diffusers' own."""
    save_file({"clip_l": torch.randn(1, DIM), "clip_g": torch.randn(1, DIM_2)}, tmp_path / "my-dog.safetensors")
    state, pipe = load_file(tmp_path / "my-dog.safetensors"), with_subject("sdxl")
    pipe.load_textual_inversion(state["clip_l"], token="<my-dog>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(state["clip_g"], token="<my-dog>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
    assert not torch.allclose(latents_of(pipe, host_prompt="a <my-dog>"), latents_of(pipe, host_prompt="a dog"), atol=1e-2)


ORDERS = list(itertools.permutations(("tokens", "weights", "subject")))


@pytest.mark.parametrize("unloading", ORDERS, ids="-".join)
@pytest.mark.parametrize("loading", ORDERS, ids="-".join)
def test_every_order_of_loading_and_unloading(tmp_path, loading, unloading):
    """Two hosts and a CAE: afterwards tokenizer, weights, processors and pictures are as before."""
    pipe = StableDiffusionDeGuPipeline.from_pipe(tiny_stock())
    pipe.set_progress_bar_config(disable=True)

    def state() -> tuple:
        return (
            len(pipe.tokenizer), {name: type(processor) for name, processor in pipe.unet.attn_processors.items()},
            {name: tensor.clone() for module in (pipe.unet, pipe.text_encoder) for name, tensor in module.state_dict().items()},
        )  # fmt: skip

    before, picture = state(), latents_of(pipe)
    generator = torch.Generator().manual_seed(2)
    lora = {f"unet.{layer.name}.to_q.lora_{kind}.weight": torch.randn(shape, generator=generator) for layer in pipe._layers()
            for kind, shape in (("A", (2, layer.module.to_q.in_features)), ("B", (layer.module.to_q.out_features, 2)))}  # fmt: skip
    load = {
        "tokens": lambda: pipe.load_textual_inversion(torch.randn(2, DIM, generator=generator), token="<my-dog>"),
        "weights": lambda: pipe.load_lora_weights(lora),
        "subject": lambda: pipe.load_cae_embeddings(as_dict(random_cae(pipe)), adapter_name="dog"),
    }
    unload = {"tokens": pipe.unload_textual_inversion, "weights": pipe.unload_lora_weights, "subject": lambda: pipe.unload_cae_embeddings("dog")}
    for name in loading:
        load[name]()
    assert not torch.allclose(latents_of(pipe, host_prompt="a <my-dog>", host_weights="host"), picture, atol=1e-2)
    for name in unloading:
        unload[name]()
    after = state()
    assert after[:2] == before[:2] and after[2].keys() == before[2].keys()
    assert all(torch.equal(after[2][name], tensor) for name, tensor in before[2].items())
    assert torch.equal(latents_of(pipe), picture)
