"""Settings of Test-time Cross-Attention Masking (TCAM)."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = ("sot", "eot", "subject")


@dataclass(frozen=True)
class TcamConfig:
    """When and how the subject mask is read from the fidelity stream's attention.

    Attributes:
        start: fraction of the steps, 0..1, before masking acts; step i is masked when i >= start * steps.
        token: the CAE sequence's token whose map is read: "sot" or "eot", inverted, or "subject", not inverted.
        resolutions: U-Nets: candidate map sizes as fractions of the latent's side; None: the family's.
        layers: MMDiT: indices of the blocks that are averaged; None: the family's.
        kernel_size: side of the Gaussian blur, odd, in map pixels; 1 is no blur.
        sigma: its standard deviation in map pixels, > 0.
    """

    start: float
    token: str
    kernel_size: int
    sigma: float
    resolutions: tuple[float, ...] | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1:
            raise ValueError(f"`start` is a fraction of the steps and has to be in [0, 1], but is {self.start}.")
        if self.token not in TOKENS:
            raise ValueError(f"`token` has to be one of {TOKENS}, but is {self.token!r}.")
        if not isinstance(self.kernel_size, int) or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` has to be a positive odd integer, but is {self.kernel_size!r}.")
        if not self.sigma > 0:
            raise ValueError(f"`sigma` has to be greater than 0, but is {self.sigma}.")
        for name in ("resolutions", "layers"):
            values = getattr(self, name)
            if values is not None:
                if len(tuple(values)) == 0:
                    raise ValueError(f"`{name}` is empty; pass None for the family's default.")
                object.__setattr__(self, name, tuple(values))

    @property
    def invert(self) -> bool:
        """The map of a non-subject token shows everything that is not the subject."""
        return self.token != "subject"
