"""The training script's arguments, named as in diffusers' own scripts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Mapping, Sequence

if TYPE_CHECKING:
    from degu.training.hosts import HostMethod

ADAMW_LEARNING_RATE = 5e-4  # per example of the joint batch; chosen by the sweep in examples/
PRODIGY_LEARNING_RATE = 1.0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Of `train_cae.py`."""
    parser = _parser("Learns a subject's context-agnostic embeddings (CAE) from a folder of pictures.")
    cae = parser.add_argument_group("embeddings")
    cae.add_argument("--num_tokens", type=int, default=5)
    cae.add_argument("--set_per", choices=("layer", "transformer"), default="transformer", help="SDXL: a set of embeddings for each of the U-Net's 11 transformers, or for each of the 70 cross-attention layers in them")
    cae.add_argument("--without_t5", action="store_true", help="SD 3: leave T5 out, to save its memory; the file then has no rows for it, and T5 hears the prompt alone")
    cae.add_argument("--no_layerwise", action="store_true", help="one set of embeddings for all cross-attention layers")
    return _checked(parser, argv)


def parse_host_args(argv: Sequence[str] | None, methods: Mapping[str, type[HostMethod]]) -> argparse.Namespace:
    """Of `train_host.py`; what the method of `--method` has as its `defaults` is the default."""
    parser = _parser("Trains a personalization method that DeGu can have as its host, from a folder of pictures.")
    host = parser.add_argument_group("host")
    host.add_argument("--method", choices=list(methods), required=True)
    host.add_argument("--placeholder_token", default="<subject>", help="what stands for the subject in prompts, for methods that learn a token")
    host.add_argument("--instance_prompt", default=None, help="for methods that learn weights; by default 'a photo of sks' and the class noun")
    host.add_argument("--num_tokens", type=int, default=1, help="learned vectors, for methods that learn a token")
    host.add_argument("--rank", type=int, default=8, help="of LoRA")
    host.add_argument("--unet_train_steps", type=int, default=1000, help="of CoRe's second stage, which fine-tunes the denoiser")
    host.add_argument("--unet_train_batch_size", type=int, default=4, help="of CoRe's second stage")
    host.add_argument("--unet_learning_rate", type=float, default=2e-6, help="of CoRe's second stage")
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--method", choices=list(methods))
    method = first.parse_known_args(argv)[0].method
    parser.set_defaults(scale_lr=False, set_per="transformer", without_t5=False, **(methods[method].defaults if method else {}))
    return _checked(parser, argv)


def _parser(description: str) -> argparse.ArgumentParser:
    """What the scripts have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", required=True, help="Hub id or local folder of the base model")
    model.add_argument("--revision", default=None)
    model.add_argument("--variant", default=None, help="variant of the weight files, e.g. fp16")
    model.add_argument("--max_sequence_length", type=int, default=None, help="length of T5's part of the sequence on SD 3, by default 256 as in the pipeline's call; shorter is faster")

    data = parser.add_argument_group("data")
    data.add_argument("--instance_data_dir", required=True, help="folder with the subject's pictures")
    data.add_argument("--instance_mask_dir", default=None, help="folder with masks of the same file names, white on the subject; the loss is then taken there")
    data.add_argument("--class_noun", required=True, help="the subject's class, e.g. dog; the embeddings start from it")
    data.add_argument("--resolution", type=int, default=None, help="side of the training images; by default the model's own")
    data.add_argument("--center_crop", action="store_true", help="crop the centre instead of a random place")
    data.add_argument("--random_flip", action="store_true", help="mirror at random; not for subjects with writing on them")
    data.add_argument("--augmentation_variants", type=int, default=16, help="views of each picture that are encoded where crops or flips are random")

    out = parser.add_argument_group("output")
    out.add_argument("--output_dir", default="cae", help="gets cae_embeddings.safetensors, checkpoints, logs and a model card")
    out.add_argument("--checkpointing_steps", type=int, default=500)
    out.add_argument("--checkpoints_total_limit", type=int, default=None)
    out.add_argument("--resume_from_checkpoint", default=None, help="a checkpoint folder, or latest")
    out.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, comet_ml, all, or none")
    out.add_argument("--push_to_hub", action="store_true")
    out.add_argument("--hub_model_id", default=None, help="repository to push to; by default the name of --output_dir")

    train = parser.add_argument_group("training")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--train_batch_size", type=int, default=8, help="per process")
    train.add_argument("--max_train_steps", type=int, default=1500)
    train.add_argument("--gradient_accumulation_steps", type=int, default=1)
    train.add_argument("--gradient_checkpointing", action="store_true")
    train.add_argument("--learning_rate", type=float, default=None, help=f"by default {ADAMW_LEARNING_RATE}, with prodigy {PRODIGY_LEARNING_RATE}")
    train.add_argument("--scale_lr", action="store_true", default=True, help="multiply the learning rate by the joint batch size (processes x accumulation x batch)")
    train.add_argument("--no_scale_lr", dest="scale_lr", action="store_false", help="take the learning rate as it is")
    train.add_argument("--lr_scheduler", default="constant", help="any of diffusers' schedules")
    train.add_argument("--lr_warmup_steps", type=int, default=0)
    train.add_argument("--optimizer", default=None, choices=("adamw", "adamw8bit", "prodigy"), help="by default adamw, on SD 3 prodigy")
    train.add_argument("--adam_beta1", type=float, default=0.9)
    train.add_argument("--adam_beta2", type=float, default=0.999)
    train.add_argument("--adam_weight_decay", type=float, default=1e-2)
    train.add_argument("--adam_epsilon", type=float, default=1e-8)
    train.add_argument("--weighting_scheme", default="none", choices=("none", "logit_normal", "mode", "sigma_sqrt", "cosmap"), help="flow matching: timesteps that are drawn more often or count more, as in diffusers' SD 3 scripts")
    train.add_argument("--logit_mean", type=float, default=0.0, help="of logit_normal")
    train.add_argument("--logit_std", type=float, default=1.0, help="of logit_normal")
    train.add_argument("--mode_scale", type=float, default=1.29, help="of mode")
    train.add_argument("--mixed_precision", default=None, choices=("no", "fp16", "bf16"), help="by default accelerate's configuration")

    validation = parser.add_argument_group("validation")
    validation.add_argument("--validation_prompt", default=None, help="plain prompt with the class noun, e.g. 'a dog in the snow'")
    validation.add_argument("--validation_steps", type=int, default=100)
    validation.add_argument("--num_validation_images", type=int, default=4)

    return parser


def _checked(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    for name in ("num_tokens", "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "checkpointing_steps",
                 "augmentation_variants", "validation_steps", "num_validation_images"):  # fmt: skip
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}")
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < 1:
        parser.error(f"--checkpoints_total_limit has to be at least 1, but is {args.checkpoints_total_limit}")
    args.output_dir = Path(args.output_dir)
    return args
