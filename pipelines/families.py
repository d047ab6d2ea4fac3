"""What differs between the model families, and the defaults that this project has chosen for them."""

from __future__ import annotations

from dataclasses import dataclass

from degu.pipelines.tcam import TcamConfig


@dataclass(frozen=True)
class Family:
    """Attributes:
    name: as in a CAE file's metadata.
    fidelity_guidance_scale: default w_f.
    host_guidance_scale: default w_h.
    tcam: default masking.
    """

    name: str
    fidelity_guidance_scale: float
    host_guidance_scale: float
    tcam: TcamConfig


# [SOT] is the paper's token for this family. The numbers come from the sweep in examples/, on the small shipped model, which cannot tell
# w_h of 1 to 4 apart.
SD = Family(
    name="sd",
    fidelity_guidance_scale=4.0,
    host_guidance_scale=3.0,
    tcam=TcamConfig(start=0.1, token="sot", kernel_size=5, sigma=1.0),
)

# [EOT] at a quarter of the latent's side is the paper's choice; the numbers are SD's, among the best in SDXL's own sweep too.
SDXL = Family(
    name="sdxl",
    fidelity_guidance_scale=4.0,
    host_guidance_scale=3.0,
    tcam=TcamConfig(start=0.1, token="eot", kernel_size=5, sigma=1.0, resolutions=(1 / 4,)),
)

# The terminal token in the middle of the transformer is the paper's choice. The numbers are SD's: in SD 3's own sweep w_f is among the best,
# and an earlier start is better, as far as a transformer of six blocks tells.
SD3 = Family(
    name="sd3",
    fidelity_guidance_scale=4.0,
    host_guidance_scale=3.0,
    tcam=TcamConfig(start=0.1, token="eot", kernel_size=5, sigma=1.0),
)
