"""The grid of checkpoints and prompts."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FAMILIES, ROOT, as_dict, random_cae
from PIL import Image

from degu.pipelines.cae_file import save_cae
from degu.training.checkpoint import save_checkpoint
from degu.training.compare_checkpoints import main
from degu.training.picture_grid import LABEL_HEIGHT

PROMPTS = ("a dog in the snow", "a dog on the beach")


@pytest.mark.parametrize("family, without_t5", [*((family, False) for family in FAMILIES), ("sd3", True)])
def test_every_picture_is_its_checkpoints(tmp_path, family, without_t5):
    stock, cls, *_ = FAMILIES[family]
    base, run, steps = tmp_path / "base", tmp_path / "run", (5, 10)
    stock().save_pretrained(base)
    pipe = cls.from_pretrained(base, **({"text_encoder_3": None, "tokenizer_3": None} if without_t5 else {}))
    pipe.set_progress_bar_config(disable=True)
    learned = {step: random_cae(pipe, seed=step) for step in steps}
    for step, cae in reversed(learned.items()):
        cae.metadata["base_model"] = str(base)
        save_checkpoint(run, step, lambda folder: save_cae(cae, folder / "cae_embeddings.safetensors", family), {}, None)
    options = ("--num_inference_steps", "1", "--fidelity_guidance_scale", "6", *(["--without_t5"] if without_t5 else []))
    command = [sys.executable, str(ROOT / "training" / "compare_checkpoints.py"), str(run), "--prompts", *PROMPTS, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-5, checkpoint-10" in done.stdout
    sheet, side = np.asarray(Image.open(run / "checkpoints.png")), 256
    for y, step in enumerate(steps):
        pipe.load_cae_embeddings(as_dict(learned[step]), adapter_name=str(step))
        for x, prompt in enumerate(PROMPTS):
            made = pipe(prompt, num_inference_steps=1, fidelity_guidance_scale=6.0, generator=torch.Generator().manual_seed(0)).images[0]
            top, left = LABEL_HEIGHT + 4 + y * (side + LABEL_HEIGHT + 4) + LABEL_HEIGHT, x * (side + 4)
            expected = np.asarray(made.resize((side, side), Image.Resampling.LANCZOS))
            np.testing.assert_allclose(sheet[top : top + side, left : left + side].astype(int), expected.astype(int), atol=1)
        pipe.unload_cae_embeddings()


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="--output_dir of a run"):
        main([str(tmp_path), "--prompts", "a dog"])
