r"""IP-Adapter as the host (SD, SDXL, SD 3; plus and face variants): the picture goes to the host stream alone.

python examples/attach/ip_adapter.py --base BASE --cae dog.safetensors --adapter h94/IP-Adapter --subfolder models --weight_name ip-adapter_sd15.bin \
    --image dog.jpg --prompt "a dog in the snow" --host_prompt "a dog in the snow"
"""

from __future__ import annotations

from common import arguments, pipeline
from diffusers.utils import load_image

parser = arguments(__doc__)
parser.add_argument("--adapter", required=True, help="folder or Hub id")
parser.add_argument("--subfolder", default="")
parser.add_argument("--weight_name", required=True)
parser.add_argument("--image", required=True)
parser.add_argument("--scale", type=float, default=0.6)
args = parser.parse_args()
pipe = pipeline(args)

pipe.load_ip_adapter(args.adapter, subfolder=args.subfolder, weight_name=args.weight_name)
pipe.set_ip_adapter_scale(args.scale)
image = pipe(args.prompt, host_prompt=args.host_prompt, num_inference_steps=args.steps, ip_adapter_image=load_image(args.image)).images[0]
image.save(args.output)
