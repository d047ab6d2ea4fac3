"""The model card that goes with a trained CAE."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping

from huggingface_hub import ModelCard, ModelCardData

from degu.pipelines.cae_file import DEFAULT_NAME

_TEXT = """---
{header}
---

# Context-agnostic embeddings of a {noun}

One subject, learned for Decoupled Guidance (DeGu) on `{base_model}`.

```python
pipe = {pipeline}.from_pretrained("{base_model}")
pipe.load_cae_embeddings("{location}")
image = pipe("a {noun} in the snow").images[0]
```

| setting | value |
|---|---|
{rows}
"""


def write_model_card(folder: Path, metadata: Mapping[str, str], repository: str | None, pipeline: str) -> None:
    """Writes `README.md` beside the embeddings, for the class `pipeline`."""
    data = ModelCardData(
        base_model=metadata["base_model"], library_name="diffusers", tags=["text-to-image", "diffusers", "degu", "context-agnostic-embeddings"]
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in metadata.items())
    text = _TEXT.format(
        header=data.to_yaml(), noun=metadata["class_noun"], base_model=metadata["base_model"], pipeline=pipeline,
        location=repository or DEFAULT_NAME, rows=rows,
    )  # fmt: skip
    ModelCard(text).save(folder / "README.md")
