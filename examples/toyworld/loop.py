"""The loop that the world's networks are trained with: AdamW, warm-up then cosine decay, resumable at any moment.

Runs in one process or, with ``ACCELERATE_USE_CPU=true torchrun --nproc_per_node N``, in N that average their gradients.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel


def save_atomically(state: dict, path: Path) -> None:
    """Writes beside ``path`` and renames, so that a file of that name is always whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def fit(
    modules: torch.nn.ModuleDict,
    loss_of: Callable[[int, np.random.Generator], torch.Tensor],
    checkpoint: Path,
    steps: int,
    learning_rate: float,
    warmup: int = 100,
    weight_decay: float = 0.01,
    ema_decay: float | None = None,
    save_every: int = 100,
    stop_at: int | None = None,
) -> bool:
    """Minimises ``loss_of(step, rng)`` over the weights of ``modules``; continues from ``checkpoint`` where it exists.

    ``loss_of`` draws its batch from ``rng``, which differs from step to step and from process to process and depends on
    nothing else, so that a resumed run sees the batches an uninterrupted one would. The modules end with their averaged
    (EMA) weights where ``ema_decay`` is given. Returns whether this process is the main one, which writes the result.
    """
    torch.set_flush_denormal(True)  # denormal numbers are many times slower on a CPU
    accelerator = Accelerator()
    device, rank = accelerator.device, accelerator.process_index
    modules.to(device).train()
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True) if ema_decay else None
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if ema:
            ema.load_state_dict(state["ema"])
        first = state["step"]
    started, running = time.time(), None
    last = steps if stop_at is None else min(steps, stop_at)
    for step in range(first, last):
        rng = np.random.default_rng((step, rank))
        torch.manual_seed(int(rng.integers(2**62)))
        loss = loss_of(step, rng)
        loss.backward()
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters]), "mean")
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad.copy_(g.view_as(p))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if ema:
            ema.step(parameters)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if accelerator.is_main_process and ((step + 1) % save_every == 0 or step + 1 == last):
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            state["schedule"] = schedule.state_dict()
            save_atomically(state | ({"ema": ema.state_dict()} if ema else {}), checkpoint)
            print(f"step {step + 1}/{steps} loss {running:.4f} {(time.time() - started) / (step + 1 - first):.3f} s/step", flush=True)
    accelerator.wait_for_everyone()
    if ema:
        ema.copy_to(parameters)
    modules.eval()
    return accelerator.is_main_process
