"""Other personalization methods on the small Stable Diffusion, alone and with DeGu attached, as in the paper's Table 1.

python examples/hosts.py [--methods ti dti p_plus neti lora dreambooth custom_diffusion core]

Each host is trained by `training/train_host.py` and loaded as its users load it. Its rows: alone; with DeGu, its weights in all
streams and, where it has any, in its own stream alone; and the paper's control (appendix G.4): the host's condition in all three
places, with the same scales and a mask from its own attention.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from learned import METHODS, add_arguments, host_of, trained, work_folder
from quickstart import caption_text
from shipped import SHIPPED, ShippedModel, starting_noise
from toyworld.oracle import Oracle
from toyworld.references import new_scenes, reference_pictures, rendered, subject_of
from toyworld.scores import scores, table

from degu.attention_processors import LayerwiseStream
from degu.pipelines.hosts import NeTI

LAYERWISE = ("p_plus", "neti")
SCALES = {"host_guidance_scale": 2.0, "guidance_scale": 2.0, "fidelity_guidance_scale": 4.0}


class EntangledMixin:
    """Goes before a DeGu pipeline in the bases: the host's prompt takes the places of both plain prompt and CAE."""

    def generate(self, host_prompts: list[str], latents, **kwargs) -> list:
        images = []
        for i, prompt in enumerate(host_prompts):
            self._entangled = prompt
            images += self(prompt, host_prompt=prompt, latents=latents[i : i + 1], **kwargs).images
        return images

    def _encode_cae(self, embeddings, sequence):
        hidden = self.encode_prompt(self._entangled, self._execution_device, 1, False)[0]
        return hidden.expand(len(embeddings["text_encoder"]), -1, -1), None


@dataclass
class HostsStream(LayerwiseStream):
    """What the host's rows see at every step, for the fidelity stream's rows, and for the plain prompt's."""

    pipe: object = None

    @contextlib.contextmanager
    def attached(self, layers):
        guided, n = self.pipe._guided, self.rows.stop - self.rows.start
        seen = guided.host_condition.stream_at(self.pipe.scheduler.timesteps[guided.step - 1])
        self.contexts, self.values = seen.contexts, seen.values
        plain = LayerwiseStream(slice(n, 2 * n), seen.contexts, values=seen.values)  # rows are [null, editability, fidelity, host]
        with plain.attached(layers), super().attached(layers):
            yield


class LayerwiseEntangledMixin:
    """`EntangledMixin` for hosts whose tokens differ from layer to layer."""

    def generate(self, host_prompts: list[str], **kwargs) -> list:
        return self(["a photo"] * len(host_prompts), host_prompt=host_prompts, **kwargs).images

    def _fidelity_stream(self, contexts, masking):
        own = super()._fidelity_stream(contexts, masking)
        return HostsStream(own.rows, own.contexts, own.maps, own.captured, pipe=self)


def entangled(pipe, model: ShippedModel, method: str, cae: Path, host: Path):
    mixin = LayerwiseEntangledMixin if method in LAYERWISE else EntangledMixin
    made = type("EntangledPipeline", (mixin, type(pipe)), {}).from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    made.enable_tcam(**model.tcam)
    made.load_cae_embeddings(cae)  # for its scale; what is in it is not used
    if method == "p_plus":
        name = made.get_active_cae_adapter()
        made.load_cae_embeddings(host, adapter_name="my-subject")
        made.set_cae_adapter(name)
    return made


@contextlib.contextmanager
def loaded(pipe, method: str, folder: Path, noun: str) -> Iterator[tuple[str, dict]]:
    """While it lasts, `pipe` has the host loaded as its users load it; yields what stands for the subject in its prompts, and what a
    call has to be told."""
    own, processors, subject = pipe.unet, pipe.unet.attn_processors, pipe.get_active_cae_adapter()
    if method in ("ti", "dti", "custom_diffusion", "core"):
        pipe.load_textual_inversion(folder, weight_name="learned_embeds.safetensors", token="<my-subject>")
    try:
        if method == "p_plus":
            pipe.load_cae_embeddings(folder, adapter_name="my-subject")
            pipe.set_cae_adapter(subject)
        elif method == "lora":
            pipe.load_lora_weights(folder)
        elif method == "custom_diffusion":
            pipe.unet.load_attn_procs(folder, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipe)
        elif method in ("dreambooth", "core"):
            pipe.unet = UNet2DConditionModel.from_pretrained(folder / ("unet" if method == "dreambooth" else "fine_tuned/unet"))
        word = {"lora": f"sks {noun}", "dreambooth": f"sks {noun}", "custom_diffusion": f"<my-subject> {noun}"}.get(method, "<my-subject>")
        yield word, {"host": NeTI.from_file(folder, token="<my-subject>")} if method == "neti" else {}
    finally:
        pipe.unet = own
        if method == "p_plus":
            pipe.unload_cae_embeddings("my-subject")
        elif method == "lora":
            pipe.unload_lora_weights()
        elif method == "custom_diffusion":
            pipe.unet.set_attn_processor(processors)
        if method in ("ti", "dti", "custom_diffusion", "core"):
            pipe.unload_textual_inversion()


def ways(pipe, model: ShippedModel, method: str, cae: Path, host: Path, prompts: list[str], noun: str, **shared) -> Iterator[tuple[str, list]]:
    """Name and pictures of each way to use the host at `host`; everything is unloaded again afterwards."""
    own = pipe.unet
    with loaded(pipe, method, host, noun) as (word, told):
        host_prompts = [prompt.replace(noun, word, 1) for prompt in prompts]
        if method in LAYERWISE:  # guidance on the host stream alone is stock's guidance on its prompt
            alone = {"host_prompt": host_prompts, "guidance_scale": 0.0, "host_guidance_scale": model.guidance_scale}
            yield method, pipe(prompts, fidelity_guidance_scale=0.0, **alone, **told, **shared).images
        else:
            yield method, pipe(host_prompts, fidelity_guidance_scale=0.0, guidance_scale=model.guidance_scale, **shared).images
        yield f"{method} + DeGu", pipe(prompts, host_prompt=host_prompts, **told, **SCALES, **shared).images
        if method in ("lora", "custom_diffusion"):
            yield f"{method} + DeGu, host weights apart", pipe(prompts, host_prompt=host_prompts, host_weights="host", **SCALES, **shared).images
        if method in ("dreambooth", "core"):
            tuned, pipe.unet = pipe.unet, own
            yield f"{method} + DeGu, host weights apart", pipe(prompts, host_prompt=host_prompts, host_unet=tuned, **SCALES, **shared).images
            pipe.unet = tuned
        yield f"{method}, control", entangled(pipe, model, method, cae, host).generate(host_prompts, **told, **SCALES, **shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add_arguments(parser)
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    model, oracle = SHIPPED["sd"], Oracle.load()
    pipe = model.load()
    collected: dict[str, list[dict[str, float]]] = {}
    with work_folder(args.work_dir) as folder:
        for subject in args.subjects:
            identity, references, fields = subject_of(subject), rendered(reference_pictures(subject)), new_scenes(subject, args.scenes) * args.seeds
            cae = trained(model, subject, folder, args.train_steps)
            pipe.load_cae_embeddings(cae, adapter_name="subject")
            shared = dict(num_inference_steps=model.steps, latents=starting_noise(pipe, len(fields), subject))
            for method in args.methods:
                host = host_of(method, model, subject, folder, args.train_steps)
                kept = folder / f"scores-{method}-{subject}-{args.scenes}-{args.seeds}.json"
                if not kept.exists():
                    rows = {}
                    for name, images in ways(pipe, model, method, cae, host, [caption_text(f) for f in fields], identity.kind, **shared):
                        rows[name] = scores(oracle, images, identity, references, fields)
                        del rows[name]["accessory"]
                    kept.write_text(json.dumps(rows))
                for name, row in json.loads(kept.read_text()).items():
                    collected.setdefault(name, []).append(row)
                    print(f"{subject} {name}: {row['fidelity']:.2f}/{row['editability']:.2f}", flush=True)
            pipe.unload_cae_embeddings("subject")
    print(table({name: {k: float(np.mean([row[k] for row in rows])) for k in rows[0]} for name, rows in collected.items()}))
    print(f"Subjects: {len(args.subjects)}; scenes: {args.scenes}; pictures of each: {args.seeds}")


if __name__ == "__main__":
    main()
