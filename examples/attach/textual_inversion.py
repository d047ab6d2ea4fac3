r"""Textual inversion, or DTI, as the host: diffusers', A1111's and kohya's files (SD, SDXL).

python examples/attach/textual_inversion.py --base BASE --cae dog.safetensors --embeddings learned_embeds.safetensors --token "<my-dog>" \
    --prompt "a dog in the snow" --host_prompt "a <my-dog> in the snow"
"""

from __future__ import annotations

from common import arguments, pipeline
from safetensors.torch import load_file

parser = arguments(__doc__)
parser.add_argument("--embeddings", required=True, help="folder or file")
parser.add_argument("--weight_name", default=None, help="the file in the folder")
parser.add_argument("--token", default="<my-dog>")
args = parser.parse_args()
pipe = pipeline(args)

if hasattr(pipe, "text_encoder_2"):  # SDXL's files have vectors for both text encoders
    vectors = load_file(args.embeddings)
    pipe.load_textual_inversion(vectors["clip_l"], token=args.token, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(vectors["clip_g"], token=args.token, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
else:
    pipe.load_textual_inversion(args.embeddings, weight_name=args.weight_name, token=args.token)
image = pipe(args.prompt, host_prompt=args.host_prompt, num_inference_steps=args.steps).images[0]
image.save(args.output)
