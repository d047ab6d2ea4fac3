"""What the examples learn of the rendered subjects: CAEs and hosts, trained as users train them, each once for a folder."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Iterator

from PIL import Image
from shipped import ShippedModel
from toyworld.references import reference_pictures, rendered, subject_of

from degu.training.train_cae import main as train_cae
from degu.training.train_host import main as train_host

# Steps and batches scaled down for a model this small, and learning rates that suit it; all else is the script's default.
METHODS: dict[str, dict[str, float]] = {
    "ti": {"max_train_steps": 400, "train_batch_size": 4},
    "dti": {"max_train_steps": 400},
    "p_plus": {"max_train_steps": 400, "train_batch_size": 4},
    "neti": {"max_train_steps": 400, "train_batch_size": 4},
    "lora": {"max_train_steps": 300, "learning_rate": 1e-3},
    "dreambooth": {"max_train_steps": 400, "learning_rate": 3e-5},  # at the paper's 5e-4 it repeats the references
    "custom_diffusion": {"max_train_steps": 300, "train_batch_size": 4, "learning_rate": 1e-3},
    "core": {"max_train_steps": 300, "train_batch_size": 4, "unet_train_steps": 200, "unet_learning_rate": 3e-5},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What experiments on several rendered subjects are told."""
    parser.add_argument("--subjects", type=int, nargs="+", default=range(10, 18), help="seeds of the rendered subjects")
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2, help="pictures per subject and scene")
    parser.add_argument("--train_steps", type=int, default=None, help="by default what suits the model")
    parser.add_argument("--work_dir", type=Path, default=None, help="keeps what is trained, to continue from; by default a temporary folder")


@contextlib.contextmanager
def work_folder(work_dir: Path | None) -> Iterator[Path]:
    """`work_dir`, made where there is none; None: a temporary folder."""
    with tempfile.TemporaryDirectory() if work_dir is None else contextlib.nullcontext(work_dir) as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def written_references(subject: int, folder: Path) -> Path:
    """Writes the subject's reference pictures into a folder of their own; returns it."""
    references = folder / f"references-{subject}"
    references.mkdir(exist_ok=True)
    for i, image in enumerate(rendered(reference_pictures(subject))):
        Image.fromarray(image).save(references / f"{i}.png")
    return references


def trained(model: ShippedModel, subject: int, folder: Path, steps: int | None = None, *options: str) -> Path:
    """Trains a CAE of the subject, `steps` long or as suits the model; returns its folder."""
    references, output = written_references(subject, folder), folder / f"cae-{model.folder.name}-{subject}-{'-'.join(options) or 'default'}"
    if not (output / "cae_embeddings.safetensors").is_file():
        train_cae([
            "--pretrained_model_name_or_path", str(model.folder), "--instance_data_dir", str(references), "--class_noun", subject_of(subject).kind,
            "--output_dir", str(output), "--max_train_steps", str(steps or model.train_steps), "--report_to", "none", *model.train_options, *options,
        ])  # fmt: skip
    return output


def host_of(method: str, model: ShippedModel, subject: int, folder: Path, steps: int | None = None) -> Path:
    """Trains the method on the subject's references, `steps` long or as suits the model; returns its folder."""
    output = folder / f"{method}-{subject}"
    if not (output / "done").exists():
        options = {name: steps if steps and name.endswith("train_steps") else value for name, value in METHODS[method].items()}
        train_host([
            "--method", method, "--pretrained_model_name_or_path", str(model.folder), "--instance_data_dir", str(written_references(subject, folder)),
            "--class_noun", subject_of(subject).kind, "--output_dir", str(output), "--report_to", "none",
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        ])  # fmt: skip
        (output / "done").touch()
    return output
