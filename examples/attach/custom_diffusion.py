"""Custom Diffusion as the host: its token, and its keys and values in the host stream alone.

python examples/attach/custom_diffusion.py --base BASE --cae dog.safetensors --weights my-dog/ --prompt "a dog in the snow" --host_prompt "a <my-dog> dog in the snow"
"""

from __future__ import annotations

from common import arguments, pipeline

parser = arguments(__doc__)
parser.add_argument("--weights", required=True, help="folder with the weights and the token's embedding")
parser.add_argument("--weight_name", default="pytorch_custom_diffusion_weights.safetensors", help="diffusers' own script writes a .bin")
parser.add_argument("--token_name", default="learned_embeds.safetensors", help="diffusers' own script writes <new1>.bin")
parser.add_argument("--token", default="<my-dog>")
args = parser.parse_args()
pipe = pipeline(args)

pipe.unet.load_attn_procs(args.weights, weight_name=args.weight_name, _pipeline=pipe)  # without `_pipeline`, diffusers 0.42 loads nothing
pipe.load_textual_inversion(args.weights, weight_name=args.token_name, token=args.token)
image = pipe(args.prompt, host_prompt=args.host_prompt, num_inference_steps=args.steps, host_weights="host").images[0]
image.save(args.output)
