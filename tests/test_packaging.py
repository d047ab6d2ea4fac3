"""A wheel made from the tree works where the tree is not."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from conftest import ROOT, SHIPPED


def test_wheel_works_outside_the_checkout(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT], check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("degu-*.whl")
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True, capture_output=True)
    script = f"""
        import degu.pipelines, degu.training.train_cae, degu.attention_processors
        assert degu.pipelines.__file__.startswith({str(tmp_path)!r}), degu.pipelines.__file__
        pipe = degu.pipelines.StableDiffusionDeGuPipeline.from_pretrained({str(SHIPPED)!r})
        print("made", len(pipe("a dog in the snow", num_inference_steps=1).images))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert "made 1" in run.stdout, run.stderr
