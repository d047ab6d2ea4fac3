"""The small world: exact masks, honest captions, and shipped models that understand each other."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHIPPED
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from toyworld.attributes import ACCESSORIES, CLASSES, COLOURS, PATTERNS, SCENES, Picture, Subject
from toyworld.captions import caption, prompt
from toyworld.denoisers import grow, new_unet_xl
from toyworld.evaluate import looks, read_back
from toyworld.oracle import WEIGHTS, Oracle
from toyworld.references import reference_pictures, rendered
from toyworld.renderer import render
from toyworld.scores import shows_colour
from toyworld.text_encoders import MAX_LENGTH
from toyworld.text_to_image import RECIPES
from toyworld.train_oracle import accuracies
from toyworld.train_vae import pictures, psnr
from transformers import AutoTokenizer


def some(count: int, seed: int = 0, **options) -> list[Picture]:
    rng = np.random.default_rng(seed)
    return [Picture.sample(rng, **options) for _ in range(count)]


def test_size_of_the_world():
    assert len(CLASSES) >= 8 and len(SCENES) >= 10 and len(PATTERNS) >= 6 and set(ACCESSORIES) == {"hat", "scarf", "glasses"}


def test_rendering_is_a_function_of_the_picture():
    for picture in some(5):
        (a, m), (b, n) = render(picture), render(picture)
        assert np.array_equal(a, b) and np.array_equal(m, n)
        assert a.shape == (64, 64, 3) and a.dtype == np.uint8 and m.shape == (64, 64) and m.dtype == bool


@pytest.mark.parametrize("kind", CLASSES)
def test_the_subject_covers_a_tenth_to_two_fifths(kind):
    rng = np.random.default_rng(1)
    shares = [render(Picture.sample(rng, subject=Subject.sample(rng, kind=kind)))[1].mean() for _ in range(60)]
    assert 0.10 <= min(shares) and max(shares) <= 0.40


def test_the_mask_is_exact():
    """Outside of it (and of its soft edge) the picture is the empty scene's; inside it differs."""
    for picture in some(20, empty=0.0, accessorised=0.0):
        image, mask = render(picture)
        empty, none = render(replace(picture, subject=None))
        assert not none.any()
        changed = np.abs(image.astype(int) - empty).max(2) > 40
        grown = np.zeros_like(mask)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                grown |= np.roll(mask, (dy, dx), (0, 1))
        assert not (changed & ~grown).any()
        assert changed[mask].mean() > 0.6


def test_identity_stays_when_all_else_changes():
    rng = np.random.default_rng(0)
    subject = replace(Subject.sample(rng, kind="mug", pattern="plain"))
    for _ in range(5):
        image, mask = render(Picture.sample(rng, subject=subject, accessorised=0.0))
        found = np.median(image[mask], axis=0) / 255
        np.testing.assert_allclose(found, subject.colour.rgb, atol=0.02)


def test_colours_are_continuous_around_their_names():
    rng = np.random.default_rng(0)
    reds = {s.colour.rgb for s in (Subject.sample(rng) for _ in range(400)) if s.colour.name == "red"}
    hues = [(colorsys.rgb_to_hsv(*rgb)[0] - COLOURS["red"][0] + 0.5) % 1 - 0.5 for rgb in reds]
    assert len(reds) > 20 and 0.01 < np.std(hues) < 0.05


def test_captions_say_what_is_there_and_about_half_of_it():
    rng = np.random.default_rng(0)
    counts = {"class": [], "scene": [], "colour": [], "pattern": []}
    for picture in some(2000, seed=1):
        text = caption(picture, rng)
        if picture.subject is None:
            assert text == SCENES[picture.scene]
            continue
        words = text.split()
        assert not (set(words) & set(CLASSES)) - {picture.subject.kind}
        assert not [name for name, phrase in SCENES.items() if phrase in text and name != picture.scene]
        counts["class"].append(picture.subject.kind in words)
        counts["scene"].append(SCENES[picture.scene] in text)
        before = words[: words.index(picture.subject.kind)] if picture.subject.kind in words else []
        counts["colour"].append(picture.subject.colour.name in before)
        counts["pattern"].append(any(w in words for w in ("plain", "stripes", "dots", "bottom", "star")))
    shares = {name: np.mean(values) for name, values in counts.items()}
    assert shares["class"] > 0.9 and 0.6 < shares["scene"] < 0.8
    assert 0.4 < shares["colour"] < 0.6 and 0.4 < shares["pattern"] < 0.6


def test_prompts_read_as_people_write():
    assert prompt("dog", "snow") == "a dog in the snow"
    assert prompt("dog", "beach", "red", "horizontal", "blue", "hat", "black") == "a red dog with horizontal blue stripes on the beach wearing a black hat"
    assert prompt("cat", colour="orange", pattern="plain") == "a plain orange cat"
    assert prompt("cat", colour="orange") == "an orange cat"


def test_references_are_five_pictures_of_one_subject_in_two_scenes():
    references = reference_pictures(3)
    assert len(references) == 5 and len({p.subject for p in references}) == 1 and len({p.scene for p in references}) == 2
    assert all(p.accessory is None for p in references) and len({im.tobytes() for im in rendered(references)}) == 5


# --- the shipped models ---


@pytest.mark.parametrize("family, size", [("sd", 20_000_000), ("sdxl", 25_000_000), ("sd3", 25_000_000)])
def test_sizes(family, size):
    assert sum(p.stat().st_size for p in (SHIPPED.parent / family).rglob("*") if p.is_file()) <= size
    assert WEIGHTS.stat().st_size <= 2_000_000


@pytest.mark.parametrize("family, names", [("sd", ["tokenizer"]), ("sdxl", ["tokenizer", "tokenizer_2"]), ("sd3", ["tokenizer", "tokenizer_2", "tokenizer_3"])])
def test_every_caption_word_is_one_token(family, names):
    tokenizers = [AutoTokenizer.from_pretrained(SHIPPED.parent / family / name) for name in names]
    rng = np.random.default_rng(0)
    for picture in some(300):
        text = caption(picture, rng)
        for tokenizer in tokenizers:
            specials = 1 if tokenizer.bos_token_id is None else 2
            assert len(tokenizer(text).input_ids) == len(text.split()) + specials <= tokenizer.model_max_length


def test_the_autoencoder_restores_pictures():
    vae = StableDiffusionPipeline.from_pretrained(SHIPPED).vae
    assert psnr(vae, pictures(np.random.default_rng(5), 64)) >= 28


def test_the_oracle_reads_renderings():
    found = accuracies(Oracle.load(), count=600, seed=5)
    assert found["kind"] >= 0.97 and found["scene"] >= 0.97
    assert min(found[name] for name in ("colour", "second_colour", "pattern")) >= 0.9
    assert found["exact colour"] >= 0.95 and found["exact second_colour"] >= 0.9 and found["region, IoU"] >= 0.8


def test_exact_colours_are_not_found_where_they_are_not():
    rng = np.random.default_rng(0)
    subject = Subject.sample(rng, kind="mug", pattern="dots")
    images = [render(Picture.sample(rng, subject=subject))[0] for _ in range(20)]
    region = Oracle.load().read(images).region
    absent = [colorsys.hsv_to_rgb(*hsv) for name, hsv in COLOURS.items() if name not in (subject.colour.name, subject.second_colour.name)]
    assert shows_colour(images, region, subject.colour.rgb).all()
    assert np.mean([shows_colour(images, region, rgb).float().mean() for rgb in absent]) < 0.15


def test_the_oracles_embeddings_tell_subjects_apart():
    """Pictures of one subject in two scenes are more alike than those of two subjects."""
    oracle, rng = Oracle.load(), np.random.default_rng(0)
    subjects = [Subject.sample(rng) for _ in range(24)]
    first, second = (oracle.read([render(Picture.sample(rng, subject=s))[0] for s in subjects]).identity for _ in range(2))
    similarity = first @ second.T
    assert (similarity.argmax(1) == torch.arange(24)).float().mean() > 0.7


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_the_stock_pipeline_follows_prompts(family):
    """In class, scene and colour, and in patterns whose colours are named."""
    pipe, oracle = DiffusionPipeline.from_pretrained(SHIPPED.parent / family), Oracle.load()
    pipe.set_progress_bar_config(disable=True)
    options = {"max_sequence_length": MAX_LENGTH} if family == "sd3" else {}
    wanted = [("dog", "snow", "red"), ("car", "desert", "blue"), ("fish", "water", "yellow"), ("robot", "night", "white"),
              ("mug", "kitchen", "purple"), ("boot", "grass", "orange"), ("bird", "beach", "red"), ("cat", "forest", "white")]  # fmt: skip
    images = pipe([prompt(*w) for w in wanted], guidance_scale=4.0, num_inference_steps=15, generator=torch.Generator().manual_seed(0), **options).images
    reading = oracle.read(images)
    assert sum(a == b for a, (_, b, _) in zip(reading.values("scene"), wanted)) >= 7
    assert sum(a == b for a, (b, _, _) in zip(reading.values("kind"), wanted)) >= 7
    assert sum(a == b for a, (_, _, b) in zip(reading.values("colour"), wanted)) >= 7
    mixed = looks()[::5] + looks()[2::5]  # all patterns: they come in sixes
    assert {look["pattern"] for look in mixed} == set(PATTERNS)
    assert read_back(pipe, oracle, mixed, guidance_scale=4.0, steps=20, seed=0)["pattern"] >= 0.75


# --- the recipe ---


def test_a_grown_denoiser_predicts_what_it_grew_from():
    """From its own text states, translated; whatever the pooled text and sizes are."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(SHIPPED, subfolder="unet")
    grown, translation = new_unet_xl(200, 40), torch.randn(128, 200) / 200**0.5
    grow(grown, unet, translation)
    latents, states, t = torch.randn(2, 8, 16, 16), torch.randn(2, 32, 200), torch.tensor([30, 700])
    added = {"text_embeds": torch.randn(2, 40), "time_ids": torch.randint(0, 64, (2, 6))}
    with torch.no_grad():
        made = grown(latents, t, states, added_cond_kwargs=added).sample
        expected = unet(latents, t, states @ translation.T).sample
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_sd_3_is_taught_with_every_set_of_its_text_encoders():
    recipe = RECIPES["sd3"](SHIPPED.parent)
    torch.manual_seed(0)
    with torch.no_grad():
        states, pooled = recipe.text_states(["a red dog in the snow"] * 64)
    left, left_pooled = recipe.with_encoders_left_out(states, pooled)
    first = recipe.pipeline.text_encoder.config.projection_dim
    parts = [
        (states[:, :-MAX_LENGTH, :first], left[:, :-MAX_LENGTH, :first], pooled[:, :first], left_pooled[:, :first]),
        (states[:, :-MAX_LENGTH, first:], left[:, :-MAX_LENGTH, first:], pooled[:, first:], left_pooled[:, first:]),
        (states[:, -MAX_LENGTH:], left[:, -MAX_LENGTH:], None, None),
    ]
    seen = []
    for whole, rest, whole_pooled, rest_pooled in parts:
        there = rest.flatten(1).any(1)
        assert torch.equal(rest, whole * there[:, None, None])
        assert whole_pooled is None or torch.equal(rest_pooled, whole_pooled * there[:, None])
        seen.append(there)
    assert len(torch.stack(seen, 1).unique(dim=0)) == 8
