"""What masking and stream handling cost per step, as a ratio to the bare denoiser on the same number of rows, in one run.

python examples/benchmark.py                                         the small Stable Diffusion, masked as in the examples; --family sdxl or sd3
python examples/benchmark.py --resolutions 0.5 1                     … from candidate maps of two sizes, the default of Stable Diffusion
python examples/benchmark.py --full_size sdxl --device cuda          SDXL's architecture with random weights, 1024 px, fp16

A step is everything between the scheduler's calls: streams, attention maps, masks, mixing. The two are timed in pairs, each first in
every other one, and compared by the median of the pairs' differences; the median's standard error says what the machine's noise allows.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from typing import Any, Callable

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_logging
from full_size import FULL_SIZE, with_random_weights
from shipped import SHIPPED

from degu.pipelines.guided_denoiser import GuidedDenoiser, Masking
from degu.pipelines.streams import Condition, map_batched

CAE_TOKENS = 5


def pipeline_around(pipeline_class: type, denoiser: torch.nn.Module):
    """A pipeline with nothing but a denoiser in it."""
    parameters = list(inspect.signature(pipeline_class.__init__).parameters.values())[1:]
    empty = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
    if "unet" in empty:
        return pipeline_class(**empty | {"unet": denoiser, "scheduler": DDIMScheduler(clip_sample=False)})
    return pipeline_class(**empty | {"transformer": denoiser, "scheduler": FlowMatchEulerDiscreteScheduler()})


def steps(pipe, clip_tokens: int, t5_tokens: int, images: int, side: int, random: Callable[..., torch.Tensor]) -> tuple[Callable, Callable]:
    """One step of the bare denoiser on the rows of three streams, and one of DeGu, whose streams these are.

    `clip_tokens`, `t5_tokens`: the lengths of the text encoders' sequences. `random`: a tensor of the shape it is given.
    """
    denoiser, family = pipe._denoiser, pipe._degu_family.name
    config, n = denoiser.config, images
    length, dim = (clip_tokens + t5_tokens, config.joint_attention_dim) if family == "sd3" else (clip_tokens, config.cross_attention_dim)
    latents, texts = random(n, config.in_channels, side, side), random(2 * n, length, dim)
    timestep, contexts, subject, told = 500, {}, Condition(None), {}
    if family == "sd3":
        timestep = torch.full((2 * n,), 500.0, device=texts.device)
        subject = Condition(random(1, length, dim), random(1, config.pooled_projection_dim))
        told = {"pooled_projections": random(2 * n, config.pooled_projection_dim)}
    else:
        contexts = {layer.name: random(1, length, dim) for layer in pipe._layers()}
    if family == "sdxl":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        subject = Condition(None, random(1, pooled))
        told = {"added_cond_kwargs": {"text_embeds": random(2 * n, pooled), "time_ids": random(2 * n, 6)}}

    first = {"sot": 0, "eot": clip_tokens + CAE_TOKENS if family == "sd3" else CAE_TOKENS + 1}[pipe.tcam.token]
    masking = Masking(0.0, pipe.tcam, slice(first, first + 1), pipe._levels(pipe.tcam))
    guided = GuidedDenoiser(
        pipe, denoiser.forward, pipe._layers(), pipe._fidelity_stream(contexts, masking), subject, None, 4.0, 0.0, masking, sliced=False
    )
    pipe._guidance_scale, pipe._guidance_rescale, pipe._num_timesteps = 7.5, 0.0, 1  # as stock's call sets them

    def three(value: Any) -> Any:
        """[null, prompt] with the first once more, as the rows of the third stream."""
        return map_batched(value, 2 * n, lambda x: torch.cat([x, x[:n]]))

    def evaluate(forward: Callable, sample: torch.Tensor, timestep, texts: torch.Tensor, told: dict) -> None:
        name = "hidden_states" if family == "sd3" else "sample"
        forward(**{name: sample}, timestep=timestep, encoder_hidden_states=texts, return_dict=False, **told)

    two_rows, three_rows = (torch.cat([latents] * 2), timestep, texts, told), (torch.cat([latents] * 3), three(timestep), three(texts), three(told))
    return lambda: evaluate(denoiser.forward, *three_rows), lambda: evaluate(guided, *two_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(SHIPPED), default="sd", help="which of the small models")
    parser.add_argument("--full_size", choices=list(FULL_SIZE), default=None, help="instead: which published architecture")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default=None, help="by default float16, on a CPU float32")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--side", type=int, default=None, help="of the latent; by default the model's own")
    parser.add_argument("--resolutions", type=float, nargs="+", default=None, help="of the candidate maps; by default what the examples have, at full size the family's")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    cuda = args.device != "cpu"
    dtype = getattr(torch, args.dtype or ("float16" if cuda else "float32"))
    family, build = FULL_SIZE.get(args.full_size, (args.family, None))
    model = SHIPPED[family]
    denoiser = with_random_weights(build, args.device, dtype) if build else model.load()._denoiser.to(args.device, dtype)
    pipe = pipeline_around(model.pipeline_class, denoiser.eval())
    settings = {} if build else dict(model.tcam)
    if args.resolutions:
        settings["resolutions"] = tuple(args.resolutions)
    pipe.enable_tcam(**settings)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(args.device, dtype)

    lengths = (77, 256) if build else (32, 32)
    side = args.side or denoiser.config.sample_size
    bare, degu = steps(pipe, *lengths, args.images, side, random)

    @torch.no_grad()
    def seconds(step: Callable[[], None]) -> float:
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def peak(step: Callable[[], None]) -> str:
        torch.cuda.reset_peak_memory_stats()
        seconds(step)
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"

    for _ in range(args.warmup):
        seconds(bare), seconds(degu)
    timed = []
    for i in range(args.repeats):
        of_bare, of_degu = (seconds(bare), seconds(degu)) if i % 2 else (seconds(degu), seconds(bare))[::-1]
        timed.append((of_bare, of_degu - of_bare))
    of_bare, added = (statistics.median(column) for column in zip(*timed))
    lower, _, upper = statistics.quantiles((difference for _, difference in timed), n=4)
    error = 1.2533 * (upper - lower) / 1.349 / args.repeats**0.5  # of a median, of a normal distribution with these quartiles
    name = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{name}, {args.full_size or f'small {family}'}, {str(dtype).removeprefix('torch.')}, latents {side}x{side}: bare denoiser on {3 * args.images} rows "
        f"{of_bare * 1e3:.2f} ms, DeGu adds {added * 1e3:.2f} ms, ratio {1 + added / of_bare:.3f} ± {error / of_bare:.3f}"
    )
    if cuda:
        print(f"Peak memory, weights included: bare denoiser {peak(bare)}, DeGu {peak(degu)}")


if __name__ == "__main__":
    main()
