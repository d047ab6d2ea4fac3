"""DreamBooth as the host: a fine-tuned denoiser that evaluates the host stream, beside the bare one.

python examples/attach/dreambooth.py --base BASE --cae dog.safetensors --denoiser my-dog/unet --prompt "a dog in the snow" --host_prompt "a sks dog in the snow"

A fine-tuned checkpoint given as --base, without --denoiser, serves all streams instead.
"""

from __future__ import annotations

from common import arguments, pipeline

parser = arguments(__doc__)
parser.add_argument("--denoiser", default=None, help="folder of the fine-tuned U-Net or transformer")
args = parser.parse_args()
pipe = pipeline(args)

own = {}
if args.denoiser is not None:
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    bare = getattr(pipe, name)
    own = {f"host_{name}": type(bare).from_pretrained(args.denoiser).to(args.device, bare.dtype)}
image = pipe(args.prompt, host_prompt=args.host_prompt, num_inference_steps=args.steps, **own).images[0]
image.save(args.output)
