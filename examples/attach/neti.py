"""NeTI as the host (SD): a token that is another one at every timestep and in every layer.

python examples/attach/neti.py --base BASE --cae dog.safetensors --mapper neti_mapper.safetensors --prompt "a dog in the snow" --host_prompt "a <my-dog> in the snow"

Files of NeTI's own code are converted with `python -m degu.pipelines.hosts.convert_neti mapper-steps-1000.pt neti_mapper.safetensors`.
"""

from __future__ import annotations

from common import arguments, pipeline

from degu.pipelines.hosts import NeTI

parser = arguments(__doc__)
parser.add_argument("--mapper", required=True, help="file, or its folder")
parser.add_argument("--token", default="<my-dog>")
args = parser.parse_args()
pipe = pipeline(args)

host = NeTI.from_file(args.mapper, token=args.token)
image = pipe(args.prompt, host_prompt=args.host_prompt, num_inference_steps=args.steps, host=host).images[0]
image.save(args.output)
