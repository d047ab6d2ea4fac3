"""The training script: what it writes, what it survives, and that it computes the method's loss."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import DIM, DIM_2, DIM_3, ROOT, noise, tiny_stock, tiny_stock_3, tiny_stock_xl
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from reference import RecordingAttention, cae_output, sd3_conditions
from safetensors import safe_open

from degu.attention_processors import cross_attention_layers
from degu.pipelines import StableDiffusion3DeGuPipeline, StableDiffusionDeGuPipeline, StableDiffusionXLDeGuPipeline
from degu.pipelines.cae_file import ContextAgnosticEmbeddings
from degu.training.arguments import parse_args
from degu.training.backbones import load_backbone
from degu.training.embeddings import LearnedEmbeddings
from degu.training.instance_images import InstanceImage, load_instance_images, training_view
from degu.training.latent_cache import Batch, cache_latents, draw_batch
from degu.training.train_cae import main

SCRIPT = ROOT / "training" / "train_cae.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_stock().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i, size in enumerate([(80, 64), (64, 90), (64, 64)]):
        PIL.Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def flags(base, photos, output, steps=4, **options) -> list[str]:
    options = {
        "pretrained_model_name_or_path": base, "instance_data_dir": photos, "output_dir": output, "class_noun": "dog",
        "max_train_steps": steps, "train_batch_size": 2, "num_tokens": 2, "learning_rate": 1e-3, "report_to": "none", "augmentation_variants": 2,
    } | options  # fmt: skip
    return [word for name, value in options.items() for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def start(*args, launcher=(sys.executable,)) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen([*launcher, str(SCRIPT), *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def rows(folder: Path) -> torch.Tensor:
    with safe_open(folder / "cae_embeddings.safetensors", "pt") as file:
        return file.get_tensor("cae.text_encoder")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the script, as people start it ---


def test_what_it_writes(base, photos, tmp_path):
    before = contents(base) | contents(photos)
    run = start(*flags(base, photos, tmp_path / "out", checkpointing_steps=2, validation_prompt="a dog in the snow", validation_steps=3, num_validation_images=2, report_to="tensorboard"))
    printed, _ = run.communicate()
    assert run.returncode == 0, printed
    assert "loss=" in printed and "lr=" in printed
    assert contents(base) | contents(photos) == before, "nothing of the user's is changed"
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"cae_embeddings.safetensors", "checkpoint-2", "checkpoint-4", "README.md", "logs", "validation"}
    assert sorted(p.name for p in (out / "validation").iterdir()) == [f"step-{s:06d}-{i}.png" for s in (3, 4) for i in range(2)]
    assert list((out / "logs").rglob("events.out.tfevents*"))
    with safe_open(out / "cae_embeddings.safetensors", "pt") as file:
        metadata, tensor = file.metadata(), file.get_tensor("cae.text_encoder")
    assert tensor.shape == (16, 2, DIM) and tensor.dtype == torch.float32
    assert metadata["format"] == "degu-cae" and metadata["format_version"] == "1" and metadata["family"] == "sd"
    assert metadata["class_noun"] == "dog" and metadata["num_tokens"] == "2" and metadata["steps"] == "4" and metadata["base_model"] == str(base)
    assert json.loads(metadata["layer_names"]) == [layer.name for layer in cross_attention_layers(tiny_stock().unet)]
    for name in ("batch_size", "learning_rate", "optimizer", "resolution", "seed", "versions"):
        assert metadata[name]
    pipe = StableDiffusionDeGuPipeline.from_pretrained(base)
    for i, place in enumerate((out, out / "checkpoint-2", out / "cae_embeddings.safetensors")):
        pipe.load_cae_embeddings(place, adapter_name=str(i))
    assert "a dog in the snow" in (out / "README.md").read_text()


@pytest.mark.parametrize("through", ["accelerate", "torchrun"])
def test_two_processes_are_one_with_twice_the_batch(base, photos, tmp_path, through):
    options = {
        "accelerate": ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "29618"),
        "torchrun": ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"),
    }
    launcher = (sys.executable, "-m", *options[through])
    two = start(*flags(base, photos, tmp_path / "two", train_batch_size=2), launcher=launcher)
    printed, _ = two.communicate()
    assert two.returncode == 0, printed
    main(flags(base, photos, tmp_path / "one", train_batch_size=4))
    torch.testing.assert_close(rows(tmp_path / "two"), rows(tmp_path / "one"), rtol=1e-4, atol=1e-5)


def test_mixed_precision(base, photos, tmp_path):
    run = start(*flags(base, photos, tmp_path, steps=2, mixed_precision="bf16", gradient_checkpointing=True))
    printed, _ = run.communicate()
    assert run.returncode == 0, printed
    assert rows(tmp_path).dtype == torch.float32 and torch.isfinite(rows(tmp_path)).all()


def test_killed_at_any_moment(base, photos, tmp_path):
    run = start(*flags(base, photos, tmp_path, steps=10**6, checkpointing_steps=1, checkpoints_total_limit=3))
    deadline = time.time() + 120
    while not (tmp_path / "checkpoint-5").exists() and run.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    found = sorted(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert 2 <= len(found) <= 4
    pipe = StableDiffusionDeGuPipeline.from_pretrained(base)
    for folder in found:
        pipe.load_cae_embeddings(folder)
    last = int(found[-1].name.split("-")[1])
    main(flags(base, photos, tmp_path, steps=last + 1, checkpointing_steps=1, resume_from_checkpoint="latest"))
    assert (tmp_path / f"checkpoint-{last + 1}").is_dir() and not list(tmp_path.glob(".unfinished*"))


def test_divergence_stops_and_keeps_the_last_good(base, photos, tmp_path):
    main(flags(base, photos, tmp_path, steps=2, checkpointing_steps=2))
    before = contents(tmp_path)
    state = torch.load(tmp_path / "checkpoint-2" / "training_state.pt", weights_only=True)
    state["optimizer"]["param_groups"][0]["lr"] = float("inf")
    state["schedule"]["base_lrs"] = [float("inf")]
    torch.save(state, tmp_path / "checkpoint-2" / "training_state.pt")
    with pytest.raises(SystemExit, match="diverged at step 3.*checkpoint-2"):
        main(flags(base, photos, tmp_path, steps=9, checkpointing_steps=1, resume_from_checkpoint="latest"))
    after = contents(tmp_path)
    assert {p for p in after if after[p] != before.get(p)} == {tmp_path / "checkpoint-2" / "training_state.pt"}


# --- resuming ---


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_resumed_equals_uninterrupted(base, photos, tmp_path, schedule):
    settings = dict(steps=5, checkpointing_steps=2, lr_scheduler=schedule, gradient_accumulation_steps=2)
    main(flags(base, photos, tmp_path / "whole", **settings))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    main(flags(base, photos, tmp_path / "again", resume_from_checkpoint="checkpoint-2", **settings))
    assert torch.equal(rows(tmp_path / "again"), rows(tmp_path / "whole"))
    assert not torch.equal(rows(tmp_path / "whole" / "checkpoint-2"), rows(tmp_path / "whole"))


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-7", "/nowhere"])
def test_a_wrong_checkpoint_is_an_error(base, photos, tmp_path, wanted):
    with pytest.raises(ValueError, match="checkpoint"):
        main(flags(base, photos, tmp_path, resume_from_checkpoint=wanted))


@pytest.mark.parametrize("changed, name", [({"num_tokens": 3}, "num_tokens"), ({"gradient_accumulation_steps": 3}, "joint batch")])
def test_resuming_with_other_settings_is_an_error(base, photos, tmp_path, changed, name):
    main(flags(base, photos, tmp_path, steps=2, checkpointing_steps=2, no_scale_lr=True))
    with pytest.raises(ValueError, match=name):
        main(flags(base, photos, tmp_path, resume_from_checkpoint="latest", no_scale_lr=True, **changed))


def test_old_checkpoints_are_dropped(base, photos, tmp_path):
    main(flags(base, photos, tmp_path, steps=5, checkpointing_steps=1, checkpoints_total_limit=2))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


# --- options ---


@pytest.mark.parametrize("options", [{"no_layerwise": True}, {"gradient_checkpointing": True}, {"optimizer": "prodigy", "learning_rate": 1.0}, {"random_flip": True, "center_crop": True}, {"resolution": 96}])
def test_options_train(base, photos, tmp_path, options):
    main(flags(base, photos, tmp_path, steps=2, **options))
    made = rows(tmp_path)
    assert made.shape[0] == (1 if "no_layerwise" in options else 16)
    assert not torch.equal(made[:, 0], made[:, 1]), "the tokens have moved from their common start"
    StableDiffusionDeGuPipeline.from_pretrained(base).load_cae_embeddings(tmp_path)


def test_gradient_checkpointing_changes_no_number(base, photos, tmp_path):
    main(flags(base, photos, tmp_path / "a", steps=2))
    main(flags(base, photos, tmp_path / "b", steps=2, gradient_checkpointing=True))
    torch.testing.assert_close(rows(tmp_path / "a"), rows(tmp_path / "b"), rtol=1e-5, atol=1e-6)


def test_prodigy_warns_of_small_rates(base, photos, tmp_path, caplog):
    main(flags(base, photos, tmp_path, steps=1, optimizer="prodigy", learning_rate=1e-3))
    assert "near 1" in caplog.text


@pytest.mark.parametrize("options, says", [({"resolution": 70}, "multiple"), ({"class_noun": ""}, "class_noun"), ({"instance_data_dir": "/nowhere"}, "not a folder")])
def test_bad_input(base, photos, tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        main(flags(base, photos, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_another_family_is_refused(photos, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "_diffusers_version": "0.40.0"}')
    with pytest.raises(ValueError, match="FluxPipeline"):
        main(flags(tmp_path, photos, tmp_path / "out"))


# --- the loss ---


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_loss_is_the_references(kind, layerwise, masked, tmp_path):
    stock = tiny_stock()
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, prediction_type=kind)
    stock.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), None, None, torch.float32, "cpu")
    layers = backbone.layers
    learned = torch.randn(len(layers) if layerwise else 1, 3, DIM, generator=torch.Generator().manual_seed(5), requires_grad=True)
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, :8], mask[1, :, 4:] = 1, 1
    batch = Batch(latents=noise(2), noise=noise(2, seed=9), timesteps=torch.tensor([100, 700]), masks=mask if masked else None, sizes=torch.zeros(2, 6))
    with backbone.conditioned_on({"text_encoder": learned}, 2) as condition:
        loss = backbone.loss(condition, batch)
        loss.backward()

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    a = (1 - betas).cumprod(0)[batch.timesteps].view(-1, 1, 1, 1)
    clean = batch.latents * stock.vae.config.scaling_factor
    noisy = a.sqrt() * clean + (1 - a).sqrt() * batch.noise
    target = batch.noise if kind == "epsilon" else a.sqrt() * batch.noise - (1 - a).sqrt() * clean
    with torch.no_grad():
        for i, layer in enumerate(cross_attention_layers(stock.unet)):
            layer.module.processor = RecordingAttention(cae_output(stock.text_encoder, stock.tokenizer, learned[i if layerwise else 0])[0])
        error = (stock.unet(noisy, batch.timesteps, torch.zeros(2, 32, DIM)).sample - target) ** 2
    expected = error[mask.expand_as(error) == 1].mean() if masked else error.mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    assert learned.grad.abs().amax((1, 2)).min() > 0, "every layer's rows are learned"
    for module in (backbone.denoiser, backbone.vae, backbone.text_encoders["text_encoder"][0]):
        assert all(not p.requires_grad and p.grad is None for p in module.parameters())


def test_rows_are_float32_in_a_half_precision_model(base):
    backbone = load_backbone(str(base), None, None, torch.bfloat16, "cpu")
    learned = LearnedEmbeddings(backbone.initial_embeddings("dog"), 16, 3)
    batch = Batch(latents=noise(1), noise=noise(1, seed=9), timesteps=torch.tensor([100]), masks=None, sizes=torch.zeros(1, 6))
    with backbone.conditioned_on(learned(), 1) as condition:
        backbone.loss(condition, batch).backward()
    parameter = learned.rows["text_encoder"]
    assert backbone.denoiser.dtype == torch.bfloat16 and parameter.dtype == parameter.grad.dtype == torch.float32
    encoder, tokenizer = backbone.text_encoders["text_encoder"]
    expected = encoder.get_input_embeddings().weight[tokenizer("dog").input_ids[1]].float()
    assert torch.equal(parameter, expected.expand(16, 3, -1))


# --- Stable Diffusion XL ---


@pytest.fixture(scope="module")
def base_xl(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base_xl")
    tiny_stock_xl().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("set_per", ["transformer", "layer"])
def test_loss_is_the_references_on_sdxl(base_xl, tmp_path, set_per):
    """A set per transformer or layer, both encoders' states, the mean pooled embedding, the view's own sizes."""
    backbone = load_backbone(str(base_xl), None, None, torch.float32, "cpu")
    backbone.configure(parse_args(flags(base_xl, tmp_path, tmp_path, set_per=set_per)))
    stock, generator = tiny_stock_xl(), torch.Generator().manual_seed(5)
    names = [layer.name for layer in cross_attention_layers(stock.unet)]
    sets = list(dict.fromkeys(names if set_per == "layer" else [name.split(".transformer_blocks.")[0] for name in names]))
    assert backbone.set_names == sets and len(sets) == (len(names) if set_per == "layer" else 7)
    learned = {"text_encoder": torch.randn(len(sets), 3, DIM, generator=generator), "text_encoder_2": torch.randn(len(sets), 3, DIM_2, generator=generator)}
    learned = {name: rows.requires_grad_() for name, rows in learned.items()}
    sizes = torch.tensor([[100.0, 80, 0, 4, 64, 64], [64, 64, 0, 0, 64, 64]])
    batch = Batch(latents=noise(2), noise=noise(2, seed=9), timesteps=torch.tensor([100, 700]), masks=None, sizes=sizes)
    with backbone.conditioned_on(learned, 2) as condition:
        loss = backbone.loss(condition, batch)
        loss.backward()
    noisy = stock.scheduler.add_noise(batch.latents * stock.vae.config.scaling_factor, batch.noise, batch.timesteps)
    encoders = ((stock.text_encoder, stock.tokenizer), (stock.text_encoder_2, stock.tokenizer_2))
    with torch.no_grad():
        outputs = [[cae_output(*encoder, row) for encoder, row in zip(encoders, pair)] for pair in zip(*learned.values())]
        for layer in cross_attention_layers(stock.unet):
            pair = outputs[next(i for i, name in enumerate(sets) if layer.name.startswith(name))]
            layer.module.processor = RecordingAttention(torch.cat([output.hidden_states[-2] for output in pair], 2))
        pooled = torch.stack([second.text_embeds for _, second in outputs]).mean(0).expand(2, -1)
        added = {"text_embeds": pooled, "time_ids": sizes}
        predicted = stock.unet(noisy, batch.timesteps, torch.zeros(2, 32, DIM + DIM_2), added_cond_kwargs=added).sample
    torch.testing.assert_close(loss.detach(), (predicted - batch.noise).square().mean(), rtol=1e-4, atol=1e-5)
    assert all(rows.grad.abs().amax((1, 2)).min() > 0 for rows in learned.values()), "every set is learned"


def test_script_on_sdxl(base_xl, photos, tmp_path):
    run = start(*flags(base_xl, photos, tmp_path, steps=2, resolution=64, mixed_precision="bf16", validation_prompt="a dog", num_validation_images=1))
    printed, _ = run.communicate()
    assert run.returncode == 0, printed
    assert (tmp_path / "validation" / "step-000002-0.png").is_file()
    assert "StableDiffusionXLDeGuPipeline" in (tmp_path / "README.md").read_text()
    with safe_open(tmp_path / "cae_embeddings.safetensors", "pt") as file:
        assert file.metadata()["family"] == "sdxl" and len(json.loads(file.metadata()["layer_names"])) == 7
        assert file.get_tensor("cae.text_encoder").shape == (7, 2, DIM) and file.get_tensor("cae.text_encoder_2").shape == (7, 2, DIM_2)
    pipe = StableDiffusionXLDeGuPipeline.from_pretrained(base_xl)
    pipe.load_cae_embeddings(tmp_path)
    assert pipe.get_list_cae_adapters() == ["default_0"]


# --- Stable Diffusion 3 ---


@pytest.fixture(scope="module")
def base_3(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base_3")
    tiny_stock_3().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("t5", [True, False])
@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_loss_is_the_references_on_sd3(base_3, tmp_path, scheme, t5):
    """Flow matching: the velocity from latents to noise, weighted as in diffusers' scripts."""
    backbone = load_backbone(str(base_3), None, None, torch.float32, "cpu", without_t5=not t5)
    stock, generator = tiny_stock_3(), torch.Generator().manual_seed(5)
    backbone.configure(parse_args(flags(base_3, tmp_path, tmp_path, weighting_scheme=scheme, max_sequence_length=20)))
    dims = {"text_encoder": DIM, "text_encoder_2": DIM_2} | ({"text_encoder_3": DIM_3} if t5 else {})
    assert backbone.initial_embeddings("dog").keys() == dims.keys()
    learned = {name: torch.randn(1, 3, dim, generator=generator).requires_grad_() for name, dim in dims.items()}
    batch = Batch(latents=noise(2), noise=noise(2, seed=9), timesteps=torch.tensor([100, 700]), masks=None, sizes=torch.zeros(2, 6))
    with backbone.conditioned_on(learned, 2) as condition:
        loss = backbone.loss(condition, batch)
        loss.backward()
    t = torch.linspace(1000, 1, 1000)[batch.timesteps] / 1000
    sigma = (3 * t / (1 + 2 * t)).view(-1, 1, 1, 1)  # the scheduler's shift is 3
    clean = (batch.latents - 0.06) * 1.5
    with torch.no_grad():
        _, _, fidelity, _ = sd3_conditions(stock, ["", ""], None, ContextAgnosticEmbeddings(learned), 20)
        predicted = stock.transformer((1 - sigma) * clean + sigma * batch.noise, timestep=1000 * sigma.flatten(), **fidelity).sample
    weight = {"none": 1, "sigma_sqrt": sigma**-2, "cosmap": 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))}[scheme]
    torch.testing.assert_close(loss.detach(), (weight * (predicted - batch.noise + clean) ** 2).mean(), rtol=1e-4, atol=1e-5)
    assert all(rows.grad.abs().amax() > 0 for rows in learned.values())


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_timesteps_have_the_scripts_density(base_3, tmp_path, scheme):
    backbone = load_backbone(str(base_3), None, None, torch.float32, "cpu")
    backbone.configure(parse_args(flags(base_3, tmp_path, tmp_path, weighting_scheme=scheme, logit_mean=0.3, logit_std=0.7, mode_scale=1.29)))
    generator = torch.Generator().manual_seed(0)
    drawn = backbone._drawn(torch.arange(1000).repeat(20)).sort().values.double() / 1000
    expected = compute_density_for_timestep_sampling(scheme, 20000, 0.3, 0.7, 1.29, generator=generator).sort().values
    assert (drawn - expected)[200:-200].abs().max() < 0.03, "all but the outermost hundredths"


def test_script_on_sd3(base_3, photos, tmp_path):
    run = start(*flags(base_3, photos, tmp_path, steps=2, learning_rate=1.0, weighting_scheme="logit_normal", validation_prompt="a dog", num_validation_images=1, gradient_checkpointing=True))
    printed, _ = run.communicate()
    assert run.returncode == 0, printed
    assert (tmp_path / "validation" / "step-000002-0.png").is_file()
    with safe_open(tmp_path / "cae_embeddings.safetensors", "pt") as file:
        assert file.metadata()["family"] == "sd3" and file.metadata()["optimizer"] == "prodigy" and json.loads(file.metadata()["layer_names"]) == []
        assert {name: file.get_tensor(name).shape for name in file.keys()} == {
            "cae.text_encoder": (1, 2, DIM), "cae.text_encoder_2": (1, 2, DIM_2), "cae.text_encoder_3": (1, 2, DIM_3)
        }  # fmt: skip
    pipe = StableDiffusion3DeGuPipeline.from_pretrained(base_3)
    pipe.load_cae_embeddings(tmp_path)


def test_without_t5(base_3, base, photos, tmp_path):
    """What is learned without T5 is what the CLIPs read, as a pipeline without T5 has it; a pipeline with T5 loads it too."""
    main(flags(base_3, photos, tmp_path, without_t5=True, learning_rate=1.0, checkpointing_steps=2))
    with safe_open(tmp_path / "cae_embeddings.safetensors", "pt") as file:
        assert {name: file.get_tensor(name).shape for name in file.keys()} == {"cae.text_encoder": (1, 2, DIM), "cae.text_encoder_2": (1, 2, DIM_2)}
    for options in ({}, {"text_encoder_3": None, "tokenizer_3": None}):
        pipe = StableDiffusion3DeGuPipeline.from_pretrained(base_3, **options)
        pipe.load_cae_embeddings(tmp_path)
        assert list(pipe.active_cae.embeddings) == ["text_encoder", "text_encoder_2"]
    with pytest.raises(ValueError, match="other settings.*without_t5"):
        main(flags(base_3, photos, tmp_path, steps=4, learning_rate=1.0, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="`--without_t5` is for Stable Diffusion 3"):
        main(flags(base, photos, tmp_path / "sd", without_t5=True))


@pytest.mark.parametrize("argument", [{"weighting_scheme": "mode"}, {"max_sequence_length": 77}, {"set_per": "layer"}])
def test_arguments_of_other_families_are_refused(base, photos, tmp_path, argument):
    name, value = next(iter(argument.items()))
    with pytest.raises(ValueError, match=f"`--{name} {value}` is for other model families; this is 'sd'"):
        main(flags(base, photos, tmp_path, **argument))


# --- pictures and latents ---


def test_views_know_their_sizes(tmp_path):
    """As SDXL's own training told it: the original's size, where the crop lies, the view's size; mirrored crops count from the other side."""
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, :20] = 255
    image = InstanceImage(tmp_path, PIL.Image.fromarray(picture))
    for seed in range(20):
        view = training_view(image, 40, False, True, np.random.default_rng(seed))
        height, width, top, left, *side = view.sizes
        assert (height, width, top, *side) == (40, 100, 0, 40, 40) and 0 <= left <= 60
        white = (view.pixels[0, 20] > 0).nonzero().flatten().tolist()
        assert white in ([c for c in range(40) if left + c < 20], [c for c in range(40) if left + c >= 80])


def test_folders_as_people_have_them(tmp_path, caplog):
    red = PIL.Image.new("RGB", (40, 20), "red")
    exif = red.getexif()
    exif[0x0112] = 6  # turn a quarter clockwise
    red.save(tmp_path / "b.jpg", exif=exif)
    PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    PIL.Image.new("L", (8, 8), 7).save(tmp_path / "c.webp", lossless=True)
    (tmp_path / ".hidden.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "notes.txt").write_text("my dog")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "more").mkdir()
    images = load_instance_images(tmp_path)
    assert [i.path.name for i in images] == ["a.png", "b.jpg", "c.webp"]
    assert images[0].picture.getpixel((0, 0)) == (255, 255, 255), "transparent becomes white"
    assert images[1].picture.size == (20, 40), "EXIF orientation is applied"
    assert images[2].picture.mode == "RGB"
    assert "skipped 4" in caplog.text


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(ValueError, match="no readable picture"):
        load_instance_images(tmp_path)


def test_masks_go_with_their_pictures(tmp_path):
    pictures, masks = tmp_path / "p", tmp_path / "m"
    pictures.mkdir(), masks.mkdir()
    PIL.Image.new("RGB", (64, 64)).save(pictures / "a.jpg")
    with pytest.raises(ValueError, match="exactly one mask"):
        load_instance_images(pictures, masks)
    PIL.Image.fromarray(np.triu(np.full((64, 64), 255, np.uint8))).save(masks / "a.png")
    (image,) = load_instance_images(pictures, masks)
    for seed in range(4):
        view = training_view(image, 32, False, True, np.random.default_rng(seed))
        assert view.pixels.shape == (3, 32, 32) and view.mask.shape == (1, 32, 32) and 0.4 < view.mask.mean() < 0.6
    PIL.Image.new("L", (9, 9)).save(masks / "a.png")
    with pytest.raises(ValueError, match="9x9"):
        load_instance_images(pictures, masks)


def test_latents_are_encoded_once_and_sampled_afresh(photos):
    stock = tiny_stock()
    images = load_instance_images(photos)
    cache = cache_latents(stock.vae, images, 64, center_crop=True, random_flip=False, variants=1, seed=0)
    with torch.no_grad():
        posterior = stock.vae.encode(training_view(images[1], 64, True, False, np.random.default_rng(0)).pixels[None]).latent_dist
    torch.testing.assert_close(cache.mean[1:2], posterior.mean)
    torch.testing.assert_close(cache.std[1:2], posterior.std)
    draws = torch.stack([draw_batch(cache, range(3 * i, 3 * i + 3), 1000, seed=0).latents for i in range(300)])
    assert len({tuple(d.flatten().tolist()) for d in draws[:, 0]}) == 300
    # Each epoch shows every picture once, so the draws' mean is the pictures' mean.
    assert ((draws.mean((0, 1)) - cache.mean.mean(0)).abs() < 6 * cache.std.amax(0) / 900**0.5).all()


def test_examples_depend_on_their_number_alone(photos):
    cache = cache_latents(tiny_stock().vae, load_instance_images(photos), 64, False, True, variants=4, seed=0)
    whole = draw_batch(cache, range(10, 18), 1000, seed=3)
    parts = [draw_batch(cache, range(10, 14), 1000, seed=3), draw_batch(cache, range(14, 18), 1000, seed=3)]
    for name in ("latents", "noise", "timesteps"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
    assert not torch.equal(draw_batch(cache, range(10, 18), 1000, seed=4).noise, whole.noise)
