"""A small network that reads a picture of the world back: attributes, and embeddings to compare pictures and captions with.

It plays the parts that CLIP and DINO have in the papers' tables. It is trained on renderings and on their reconstructions
by the autoencoder, never on pictures that the method it judges has made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from toyworld.attributes import ACCESSORIES, CLASSES, COLOURS, PATTERNS, SCENES, Picture

WEIGHTS = Path(__file__).parent / "models" / "oracle" / "oracle.safetensors"
NONE = "none"
FIELDS = {
    "kind": [*CLASSES, NONE],
    "scene": list(SCENES),
    "colour": list(COLOURS),
    "pattern": list(PATTERNS),
    "second_colour": list(COLOURS),
    "accessory": [*ACCESSORIES, NONE],
    "accessory_colour": list(COLOURS),
}
EMBEDDING = 48


def fields_of(picture: Picture) -> dict[str, str]:
    """The attributes of ``picture`` by field; those that do not exist in it (a plain subject's second colour) are absent."""
    subject = picture.subject
    fields = {"scene": picture.scene, "kind": subject.kind if subject else NONE, "accessory": picture.accessory or NONE}
    if subject is not None:
        fields |= {"colour": subject.colour.name, "pattern": subject.pattern}
        if subject.pattern != "plain":
            fields["second_colour"] = subject.second_colour.name
    if picture.accessory is not None:
        fields["accessory_colour"] = picture.accessory_colour.name
    return fields


def stacked(images: Sequence) -> torch.Tensor:
    """PIL pictures or uint8 RGB arrays as one tensor (n, 3, h, w) in 0..1."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


@dataclass
class Reading:
    """What the oracle sees in n pictures.

    Attributes:
        logits: by field, (n, values).
        region: logits of where the subject is, (n, 16, 16).
        clip: unit vectors (n, 48) that share their space with captions (CLIP-I, CLIP-T).
        identity: unit vectors (n, 48), alike for pictures of one subject in different scenes and poses (DINO).
    """

    logits: dict[str, torch.Tensor]
    region: torch.Tensor
    clip: torch.Tensor
    identity: torch.Tensor

    def value(self, field: str, picture: int) -> str:
        return FIELDS[field][int(self.logits[field][picture].argmax())]

    def values(self, field: str) -> list[str]:
        return [self.value(field, i) for i in range(len(self.clip))]


class Oracle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1), _Block(32),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), _Block(64),
            nn.Conv2d(64, 96, 4, stride=2, padding=1), _Block(96), _Block(96),
        )  # fmt: skip
        self.pool = nn.Sequential(nn.Conv2d(96, 112, 4, stride=2, padding=1), nn.GroupNorm(8, 112), nn.SiLU())
        self.mix = nn.Sequential(nn.Linear(112 * 16, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(values)) for name, values in FIELDS.items()})
        self.region = nn.Sequential(nn.Conv2d(96, 4, 1), nn.PixelShuffle(2))
        self.clip = nn.Linear(128, EMBEDDING)
        self.identity = nn.Linear(128, EMBEDDING)
        self.words = nn.ModuleDict({name: nn.Embedding(len(values), EMBEDDING) for name, values in FIELDS.items()})

    @property
    def device(self) -> torch.device:
        return self.clip.weight.device

    def forward(self, images: torch.Tensor) -> Reading:
        """``images``: (n, 3, 64, 64) in -1..1."""
        features = self.trunk(images)
        state = self.mix(self.pool(features).flatten(1))
        return Reading(
            logits={name: head(state) for name, head in self.heads.items()},
            region=self.region(features)[:, 0],
            clip=F.normalize(self.clip(state), dim=1),
            identity=F.normalize(self.identity(state), dim=1),
        )

    def embed_captions(self, captions: Sequence[dict[str, str]]) -> torch.Tensor:
        """Unit vectors (n, 48) of captions, given as the attributes that they name."""
        sums = []
        for fields in captions:
            rows = [self.words[name].weight[FIELDS[name].index(value)] for name, value in fields.items()]
            sums.append(torch.stack(rows).sum(0))
        return F.normalize(torch.stack(sums), dim=1)

    @torch.no_grad()
    def read(self, images) -> Reading:
        """Reads PIL pictures or uint8 RGB arrays of 64x64 pixels."""
        return self(stacked(images).to(self.device) * 2 - 1)

    def save(self, path: Path = WEIGHTS) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Oracle:
        oracle = cls()
        oracle.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        return oracle.eval()
