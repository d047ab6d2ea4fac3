"""A LoRA as the host (SD, SDXL, SD 3): its weights act in the host stream alone.

python examples/attach/lora.py --base BASE --cae dog.safetensors --lora my-dog-lora/ --prompt "a dog in the snow" --host_prompt "a sks dog in the snow"

Several at once: load them under names, then `pipe.set_adapters(["dog", "style"], [1.0, 0.5])`.
"""

from __future__ import annotations

from common import arguments, pipeline

parser = arguments(__doc__)
parser.add_argument("--lora", required=True, help="folder, file or Hub id")
args = parser.parse_args()
pipe = pipeline(args)

pipe.load_lora_weights(args.lora)
image = pipe(args.prompt, host_prompt=args.host_prompt, num_inference_steps=args.steps, host_weights="host").images[0]
image.save(args.output)
