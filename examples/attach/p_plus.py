"""P+ as the host (SD, SDXL): a token that is another one in every layer.

python examples/attach/p_plus.py --base BASE --cae dog.safetensors --embeddings my-dog-p-plus/ --prompt "a dog in the snow" --host_prompt "a <my-dog> in the snow"
"""

from __future__ import annotations

from common import arguments, pipeline

parser = arguments(__doc__)
parser.add_argument("--embeddings", required=True, help="what `train_host.py --method p_plus` has written")
args = parser.parse_args()
pipe = pipeline(args)

pipe.load_cae_embeddings(args.embeddings, adapter_name="my-dog")  # read like a CAE, used as `<my-dog>` in the host prompt
pipe.set_cae_adapter("subject")
image = pipe(args.prompt, host_prompt=args.host_prompt, num_inference_steps=args.steps).images[0]
image.save(args.output)
