"""What masking and stream handling cost per step, as a ratio to the bare denoiser on the same number of rows, in one run.

python examples/benchmark.py                                         the shipped model, with the masks that the examples read from it
python examples/benchmark.py --resolutions 0.5 1                     … from candidate maps of two sizes, the family's default
python examples/benchmark.py --full_size --device cuda               SD 2.1's architecture with random weights, 768 px, fp16

A step is everything between the scheduler's calls: streams, attention maps, masks, mixing. The two are timed in pairs, each first in
every other one, and compared by the median of the pairs' differences; the median's standard error says what the machine's noise allows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel
from shipped import SHIPPED

from degu.attention_processors import LayerwiseStream, cross_attention_layers
from degu.pipelines.families import SD
from degu.pipelines.guided_denoiser import GuidedDenoiser, Masking



def full_size_unet() -> UNet2DConditionModel:
    """Stable Diffusion 2.1's denoiser."""
    return UNet2DConditionModel(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True, upcast_attention=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full_size", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--resolutions", type=float, nargs="+", default=None, help="of the candidate maps; by default what the examples have, at full size the family's")
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    dtype = torch.float16 if args.device != "cpu" else torch.float32
    unet = full_size_unet() if args.full_size else UNet2DConditionModel.from_pretrained(SHIPPED["sd"].folder, subfolder="unet", dtype=torch.float32)
    unet = unet.to(args.device, dtype).eval()
    n, side, layers = args.images, unet.config.sample_size, cross_attention_layers(unet)
    tokens = 77 if args.full_size else 32
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(args.device, dtype)

    latents, texts = random(n, unet.config.in_channels, side, side), random(2 * n, tokens, unet.config.cross_attention_dim)
    contexts = {layer.name: random(1, tokens, unet.config.cross_attention_dim) for layer in layers}
    levels = sorted({layer.level for layer in layers if layer.decoder}, reverse=True)
    resolutions = args.resolutions or (None if args.full_size else SHIPPED["sd"].tcam["resolutions"])
    levels = tuple(levels[:2] if resolutions is None else [level for level in levels if 2.0**-level in resolutions])
    pipe = SimpleNamespace(guidance_scale=7.5, guidance_rescale=0.0, num_timesteps=1)
    captured = frozenset(layer.name for layer in layers if layer.decoder and layer.level in levels)
    fidelity, masking = LayerwiseStream(slice(0), contexts, None, captured), Masking(0.0, SD.tcam, slice(0, 1), levels)
    guided = GuidedDenoiser(pipe, unet.forward, layers, fidelity, None, None, 2.0, 0.0, masking, sliced=False)
    sample, rows, three = torch.cat([latents] * 2), torch.cat([latents] * 3), torch.cat([texts, texts[:n]])

    @torch.no_grad()
    def seconds(step) -> float:
        if args.device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def bare():
        unet.forward(rows, 500, three, return_dict=False)

    def degu():
        guided(sample, 500, texts, return_dict=False)

    for _ in range(5):
        seconds(bare), seconds(degu)
    timed = []
    for i in range(args.repeats):
        of_bare, of_degu = (seconds(bare), seconds(degu)) if i % 2 else (seconds(degu), seconds(bare))[::-1]
        timed.append((of_bare, of_degu - of_bare))
    of_bare, added = (statistics.median(column) for column in zip(*timed))
    lower, _, upper = statistics.quantiles((difference for _, difference in timed), n=4)
    error = 1.2533 * (upper - lower) / 1.349 / args.repeats**0.5  # of a median, of a normal distribution with these quartiles
    name = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}: bare denoiser on {3 * n} rows {of_bare * 1e3:.2f} ms, DeGu adds {added * 1e3:.2f} ms, ratio {1 + added / of_bare:.3f} ± {error / of_bare:.3f}")


if __name__ == "__main__":
    main()
