"""What the personalization methods have in common that DeGu can have as hosts: each learns on the bare backbone, and writes the file format
of its own users."""

from __future__ import annotations

import inspect

import numpy as np

from degu.pipelines.streams import Condition
from degu.training.method import Method

# Textual inversion's templates for objects; {} is the placeholder.
TEMPLATES = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}", "a photo of a dirty {}",
    "a dark photo of the {}", "a photo of my {}", "a photo of the cool {}", "a close-up photo of a {}", "a bright photo of the {}",
    "a cropped photo of a {}", "a photo of the {}", "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}",
    "a rendition of the {}", "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}", "a good photo of a {}",
    "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}", "a photo of the large {}", "a photo of a cool {}", "a photo of a small {}",
)  # fmt: skip



class HostMethod(Method):
    """Attributes:
    defaults: of the script's arguments, the paper's for this method where it says any.
    families: of models that the method is for.
    learning_rate: the default with AdamW.
    then: what is trained after it, with arguments that it makes of the first's.
    """

    defaults: dict = {}
    families: tuple[str, ...] = ("sd", "sdxl", "sd3")
    learning_rate: float
    then: type[HostMethod] | None = None

    def __init__(self, backbone, args) -> None:
        super().__init__(backbone, args)
        if backbone.family not in self.families:
            raise ValueError(
                f"`--method {args.method}` is for models of {list(self.families)}, and this one is {backbone.family!r}; `lora` and `dreambooth` are for all."
            )

    def encoded(self, prompts: list[str]) -> Condition:
        """Prompts as the model's own pipeline encodes them."""
        others = {"prompt_2": None, "prompt_3": None} if self.backbone.family == "sd3" else {}  # stock requires these there
        encoded = self.backbone.pipeline.encode_prompt(
            prompt=prompts,
            **others,
            device=self.backbone.denoiser.device,  # not the pipeline's: the VAE has been moved away
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **self.backbone.call_options,
        )
        return Condition(encoded[0], encoded[2] if len(encoded) > 2 else None)

    def templates(self, examples: range) -> list[str]:
        """Each example's template: a function of its number alone."""
        return [TEMPLATES[np.random.default_rng((self.args.seed, 3, example)).integers(len(TEMPLATES))] for example in examples]


def host_alone(pipeline) -> dict[str, float]:
    """Scales with which guidance on the host stream alone is stock's guidance on its prompt, at stock's scale."""
    stock_scale = inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
    return {"guidance_scale": 0.0, "fidelity_guidance_scale": 0.0, "host_guidance_scale": stock_scale}
