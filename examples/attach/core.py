"""CoRe as the host: its vectors in the host prompt, its U-Net in the host stream.

python examples/attach/core.py --base BASE --cae dog.safetensors --core my-dog-core/ --prompt "a dog in the snow" --host_prompt "a <my-dog> in the snow"
"""

from __future__ import annotations

from common import arguments, pipeline

parser = arguments(__doc__)
parser.add_argument("--core", required=True, help="what `train_host.py --method core` has written")
parser.add_argument("--token", default="<my-dog>")
args = parser.parse_args()
pipe = pipeline(args)

pipe.load_textual_inversion(args.core, weight_name="learned_embeds.safetensors", token=args.token)
unet = type(pipe.unet).from_pretrained(f"{args.core}/fine_tuned/unet").to(args.device, pipe.unet.dtype)
image = pipe(args.prompt, host_prompt=args.host_prompt, num_inference_steps=args.steps, host_unet=unet).images[0]
image.save(args.output)
