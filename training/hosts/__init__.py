"""Personalization methods that DeGu can have as hosts."""

from degu.training.hosts.core import CoRe
from degu.training.hosts.custom_diffusion import CustomDiffusion
from degu.training.hosts.fine_tuning import DreamBooth, LoRA
from degu.training.hosts.host_method import HostMethod
from degu.training.hosts.neti import NeTIMethod
from degu.training.hosts.p_plus import PPlus
from degu.training.hosts.textual_inversion import DirectionalTextualInversion, TextualInversion

METHODS: dict[str, type[HostMethod]] = {
    "ti": TextualInversion, "dti": DirectionalTextualInversion, "p_plus": PPlus, "neti": NeTIMethod, "dreambooth": DreamBooth, "lora": LoRA,
    "custom_diffusion": CustomDiffusion, "core": CoRe,
}  # fmt: skip
