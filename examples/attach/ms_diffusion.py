r"""MS-Diffusion as the host (SDXL): pictures of one or several subjects, each in a box of its own.

python examples/attach/ms_diffusion.py --base BASE --cae dog.safetensors --adapter ms_adapter.safetensors --image_encoder laion/CLIP-ViT-bigG-14-laion2B-39B-b160k \
    --images dog.jpg cat.jpg --phrases dog cat --boxes 0,0.2,0.5,1 0.5,0.2,1,1 --prompt "a dog and a cat on the beach" --host_prompt "a dog and a cat on the beach"

The adapter is converted with `python -m degu.pipelines.hosts.convert_ms_diffusion ms_adapter.bin ms_adapter.safetensors`.
"""

from __future__ import annotations

from common import arguments, pipeline
from diffusers.utils import load_image
from transformers import CLIPVisionModelWithProjection

from degu.pipelines.hosts import MSAdapter, MSDiffusion

parser = arguments(__doc__)
parser.add_argument("--adapter", required=True)
parser.add_argument("--image_encoder", required=True, help="folder or Hub id")
parser.add_argument("--images", nargs="+", required=True)
parser.add_argument("--phrases", nargs="+", required=True, help="what is on each picture")
parser.add_argument("--boxes", nargs="+", required=True, help="left,top,right,bottom in 0..1, for each picture")
parser.add_argument("--scale", type=float, default=0.6)
args = parser.parse_args()
pipe = pipeline(args)

adapter = MSAdapter.from_file(args.adapter).to(args.device, pipe.unet.dtype)
encoder = CLIPVisionModelWithProjection.from_pretrained(args.image_encoder).to(args.device, pipe.unet.dtype)
boxes = [[float(number) for number in box.split(",")] for box in args.boxes]
host = MSDiffusion(adapter, encoder, [load_image(image) for image in args.images], args.phrases, boxes, args.scale)
image = pipe(args.prompt, host_prompt=args.host_prompt, num_inference_steps=args.steps, host=host).images[0]
image.save(args.output)
