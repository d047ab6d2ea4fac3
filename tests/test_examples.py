"""The examples, as people start them, cut short."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image


def run(*args: str) -> str:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_quickstart(tmp_path, family):
    printed = run("examples/quickstart.py", "--family", family, "--output_dir", str(tmp_path), "--train_steps", "3", "--samples", "1")
    for name in ("stock prompt", "CAE in the prompt", "DGM", "DeGu", "clip_t", "dino"):
        assert name in printed
    assert Image.open(tmp_path / "comparison.png").width > 900
    assert Image.open(tmp_path / "guidance.png").height > 600
    assert (tmp_path / "cae" / "cae_embeddings.safetensors").is_file() and len(list((tmp_path / "references").iterdir())) == 5


def test_quickstart_on_own_pictures(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (300, 200), "orange").save(tmp_path / "photos" / "a.jpg")
    run("examples/quickstart.py", "--images", str(tmp_path / "photos"), "--class_noun", "dog", "--output_dir", str(tmp_path / "out"), "--train_steps", "2", "--samples", "1")
    assert (tmp_path / "out" / "comparison.png").is_file()


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_benchmark_prints_a_ratio(family):
    printed = run("examples/benchmark.py", "--family", family, "--warmup", "0", "--repeats", "2")
    assert f"small {family}, float32, latents 16x16" in printed and "ratio" in printed


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_ablation(family):
    """A third of the default training is enough to see the paper's order on an easy subject. (On SD 3 the order is another: README.)"""
    printed = run("examples/ablation.py", "--family", family, "--subjects", "14", "--scenes", "4", "--seeds", "1", "--train_steps", "150")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("| ")]
    overall = {row[0]: float(row[rows[0].index("overall")]) for row in rows[1:]}
    assert overall["CAE in the prompt"] < overall["DGM"] < overall["DGM + TCAM"]
    assert overall["class noun"] < overall["DGM + TCAM"]
    assert "Subjects: 1; scenes: 4" in printed and "IoU" in printed


def test_hosts(tmp_path):
    printed = run("examples/hosts.py", "--subjects", "14", "--scenes", "1", "--seeds", "1", "--train_steps", "2", "--work_dir", str(tmp_path))
    for method in ("ti", "dti", "p_plus", "neti", "lora", "dreambooth", "custom_diffusion", "core"):
        assert f"| {method} |" in printed and f"| {method} + DeGu |" in printed
    assert "| lora + DeGu, host weights apart |" in printed and "| ti, control |" in printed
    assert "| core + DeGu, host weights apart |" in printed and "| neti, control |" in printed


def test_attention_collapse(tmp_path):
    printed = run("examples/attention_collapse.py", "--subjects", "14", "--scenes", "2", "--train_steps", "2", "--output", str(tmp_path / "maps.png"))
    assert "textual inversion: median Attention Collapse Score" in printed
    assert Image.open(tmp_path / "maps.png").width > 500


def test_text_pathways():
    printed = run("examples/text_pathways.py", "--subjects", "14", "--scenes", "2", "--seeds", "1", "--train_steps", "2")
    rows = [line for line in printed.splitlines() if line.startswith(("| class noun, ", "| CAE in the prompt, "))]
    assert len(rows) == 10 and any("T5's tokens alone" in row for row in rows)


@pytest.mark.parametrize("t5", ["prompt", "none"])
def test_without_t5(t5):
    printed = run("examples/ablation.py", "--family", "sd3", "--t5", t5, "--tokens", "--subjects", "14", "--scenes", "1", "--seeds", "1", "--train_steps", "2")
    assert "| [SOT] |" in printed


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_tokens(tmp_path, family):
    printed = run("examples/ablation.py", "--family", family, "--tokens", "--subjects", "14", "--scenes", "2", "--seeds", "1", "--train_steps", "2", "--work_dir", str(tmp_path))
    assert all(f"| [{token}] |" in printed for token in ("SOT", "EOT", "SUBJECT"))


def test_sweep(tmp_path):
    run("examples/sweep.py", "--stages", "masks", "--train_steps", "2", "--output", str(tmp_path / "sweep.md"))
    assert "| [SOT] at 1/1, blur 3, 0.5 |" in (tmp_path / "sweep.md").read_text()
