"""The training loop of all scripts: data, optimizer, progress, checkpoints, validation; a `Method` says what is learned."""

from __future__ import annotations

import logging

import accelerate
import diffusers
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler
from huggingface_hub import create_repo, upload_folder
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm

from degu.training.arguments import PRODIGY_LEARNING_RATE
from degu.training.backbones import load_backbone
from degu.training.checkpoint import find_checkpoint, load_state, save_checkpoint
from degu.training.instance_images import is_augmented, load_instance_images
from degu.training.latent_cache import cache_latents, draw_batch
from degu.training.log import logger
from degu.training.method import Method

# What has to be as it was for a resumed run to equal an uninterrupted one.
_RUN = ("method", "rank", "instance_prompt", "num_tokens", "no_layerwise", "resolution", "center_crop", "random_flip", "optimizer", "learning_rate", "seed",
        "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "max_sequence_length", "set_per", "without_t5")  # fmt: skip


def new_optimizer(args, parameters) -> torch.optim.Optimizer:
    """The optimizer that `--optimizer` names, on float32 parameters.

    Raises:
        ImportError: its package is not installed.
    """
    adam = dict(lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, eps=args.adam_epsilon, **adam)
    if args.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError("`--optimizer adamw8bit` needs bitsandbytes: pip install bitsandbytes.") from error
        return bitsandbytes.optim.AdamW8bit(parameters, eps=args.adam_epsilon, **adam)
    try:
        import prodigyopt
    except ImportError as error:
        raise ImportError("`--optimizer prodigy` needs prodigyopt: pip install prodigyopt.") from error
    if args.learning_rate < 0.1:
        logger.warning(f"Prodigy finds its own step size and wants a learning rate near 1, but --learning_rate is {args.learning_rate}.")
    return prodigyopt.Prodigy(parameters, eps=args.adam_epsilon, use_bias_correction=True, safeguard_warmup=True, **adam)


def metadata_of(args, base_model: str, step: int, batch: int, learning_rate: float, resolution: int) -> dict[str, str]:
    """How a CAE was trained, as its file says it."""
    versions = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "accelerate": accelerate}
    return {
        "base_model": base_model,
        "revision": args.revision or "",
        "class_noun": args.class_noun,
        "steps": str(step),
        "batch_size": str(batch),
        "learning_rate": str(learning_rate),
        "optimizer": args.optimizer,
        "resolution": str(resolution),
        "seed": str(args.seed),
        "versions": ", ".join(f"{name} {module.__version__}" for name, module in versions.items()),
    }


def validate(args, accelerator: Accelerator, backbone, method: Method, step: int) -> None:
    """Pictures for `--validation_prompt` from the modules already in memory: to the trackers and to `validation/`."""
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_validation_images)]
    with method.in_use(backbone.pipeline, args.validation_prompt) as (prompt, options):
        images = backbone.pipeline([prompt] * args.num_validation_images, generator=generators, **backbone.call_options, **options).images
    folder = args.output_dir / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        image.save(folder / f"step-{step:06d}-{index}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("validation", np.stack([np.asarray(i) for i in images]), step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"validation": [wandb.Image(i, caption=args.validation_prompt) for i in images]}, step=step)


def average_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter]) -> None:
    """Gives all processes the mean of their gradients."""
    if accelerator.num_processes > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        vector_to_parameters(accelerator.reduce(parameters_to_vector(gradients), "mean"), gradients)


def train(args, new_method: type[Method]) -> None:
    """Trains `new_method(backbone, args)` as the arguments say, and writes the result to `args.output_dir`."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(args.output_dir), logging_dir=str(args.output_dir / "logs")),
    )
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    torch.manual_seed(args.seed)

    images = load_instance_images(args.instance_data_dir, args.instance_mask_dir)
    resume = find_checkpoint(args.output_dir, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    backbone = load_backbone(args.pretrained_model_name_or_path, args.revision, args.variant, dtype, accelerator.device, args.without_t5)
    args.optimizer = args.optimizer or backbone.default_optimizer
    if args.learning_rate is None:
        args.learning_rate = PRODIGY_LEARNING_RATE if args.optimizer == "prodigy" else new_method.learning_rate
    backbone.configure(args)
    if args.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    resolution = args.resolution or backbone.default_resolution
    if resolution % backbone.resolution_multiple:
        raise ValueError(f"`--resolution` has to be a multiple of {backbone.resolution_multiple} for this model, but is {resolution}.")

    method = new_method(backbone, args)
    learned = method.learned.to(accelerator.device)
    parameters = [parameter for parameter in learned.parameters() if parameter.requires_grad]
    joint_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    if args.scale_lr and args.optimizer != "prodigy":
        args.learning_rate *= joint_batch
    optimizer = new_optimizer(args, parameters)
    # accelerate advances the schedule once per process and step.
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    cache = cache_latents(
        backbone.vae, images, resolution, args.center_crop, args.random_flip,
        variants=args.augmentation_variants if is_augmented(images, args.center_crop, args.random_flip) else 1, seed=args.seed,
    )  # fmt: skip
    # The pictures are encoded: from here on the VAE only decodes validation pictures.
    backbone.vae.to("cpu" if args.validation_prompt is None else accelerator.device, dtype)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)

    run = {name: getattr(args, name, None) for name in _RUN} | {"joint batch": joint_batch}
    step = 0
    if resume is not None:
        state = load_state(resume)
        changed = {name: (state["run"][name], value) for name, value in run.items() if state["run"].get(name, value) != value}
        if changed:
            raise ValueError(f"{resume} was trained with other settings (then, now): {changed}. Resume with the same, or start anew.")
        method.load_state_dict(state["learned"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]
        logger.info(f"Continuing from {resume} at step {step}.")

    def metadata() -> dict[str, str]:
        return metadata_of(args, args.pretrained_model_name_or_path, step, joint_batch, args.learning_rate, resolution)

    logger.info(
        f"{len(images)} pictures, {cache.variants} views each, at {resolution} px; {method.description}; "
        f"{args.max_train_steps} steps of {joint_batch} examples; learning rate {args.learning_rate:g}."
    )
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(method.name, config={n: v for n, v in vars(args).items() if isinstance(v, (int, float, str, bool))})
    last_good = resume
    progress = tqdm(total=args.max_train_steps, initial=step, desc="steps", disable=not accelerator.is_local_main_process)
    while step < args.max_train_steps:
        losses = []
        for micro in range(args.gradient_accumulation_steps):
            # Examples are numbered through the whole run: this micro-batch's, then this process's share of them.
            block = (step * args.gradient_accumulation_steps + micro) * accelerator.num_processes + accelerator.process_index
            examples = range(block * args.train_batch_size, (block + 1) * args.train_batch_size)
            batch = draw_batch(cache, examples, backbone.num_train_timesteps, args.seed)
            with method.conditioned(examples, batch) as condition:
                with accelerator.autocast():
                    loss = method.loss(condition, batch)
                accelerator.backward(loss)  # divided by the number of micro-batches
            losses.append(accelerator.gather(loss.detach()).mean())
        average_gradients(accelerator, parameters)
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        schedule.step()
        optimizer.zero_grad()
        step += 1
        mean_loss = torch.stack(losses).mean().item()
        if not np.isfinite(mean_loss) or not all(bool(torch.isfinite(p).all()) for p in parameters):
            progress.close()
            kept = f"The last good embeddings are in {last_good}." if last_good else "No checkpoint had been written yet."
            raise SystemExit(f"Training diverged at step {step}: the loss is {mean_loss}. {kept} Try a lower --learning_rate.")
        logs = {"loss": mean_loss, "lr": schedule.get_last_lr()[0]}
        progress.update()
        progress.set_postfix(loss=f"{logs['loss']:.4f}", lr=f"{logs['lr']:.2e}")
        accelerator.log(logs, step=step)
        if accelerator.is_main_process:
            if step % args.checkpointing_steps == 0:
                state = {"learned": method.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                state |= {"step": step, "run": run}
                last_good = save_checkpoint(args.output_dir, step, lambda folder: method.save(folder, metadata()), state, args.checkpoints_total_limit)
            if args.validation_prompt is not None and (step % args.validation_steps == 0 or step == args.max_train_steps):
                validate(args, accelerator, backbone, method, step)
    progress.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        method.save(args.output_dir, metadata())
        repository = None
        if args.push_to_hub:
            repository = create_repo(args.hub_model_id or args.output_dir.name, exist_ok=True).repo_id
        method.write_model_card(args.output_dir, metadata(), repository)
        if repository is not None:
            upload_folder(repo_id=repository, folder_path=args.output_dir, ignore_patterns=["checkpoint-*", "logs/*", ".*"])
        logger.info(f"Wrote {args.output_dir / method.file_name}.")
    accelerator.end_training()

