"""The text of a model card: what a saved embedder is, how to use it, where it comes from."""

import json
from collections.abc import Mapping
from typing import Any

_TEMPLATE = """\
---
library_name: vitembed
tags: [image-embeddings, vision-transformer, metric-learning]
---

# Image embedder

A Vision Transformer ({depth} blocks of width {width}, {heads} heads, {stem} of {patch_size} pixels, {parameters:,}
parameters) that maps {image_size} {mode} images to unit vectors of {dim} numbers. The cosine of two vectors says how
alike two images are.

```python
from vitembed import Embedder

model = Embedder.from_pretrained("this folder")
vectors = model.encode(["a.jpg", "b.jpg"])  # (2, {dim}) float32, rows of length 1
```

Fingerprint: `{fingerprint}`

## Where it comes from

```json
{provenance}
```

## Licence and limits

To be filled in by whoever publishes it: the licence of the training images, on what the model was measured, and on
what it was not.
"""


def model_card(config: Mapping[str, Any], *, dim: int, parameters: int, fingerprint: str) -> str:
    """Return the Markdown of a card.

    Args:
        config: the saved configuration of an embedder, with "vit", "preprocess" and "provenance".
        dim: width of an embedding.
        parameters: how many numbers the network holds.
        fingerprint: of weights and pre-processing.
    """
    vit, preprocess = config["vit"], config["preprocess"]
    return _TEMPLATE.format(
        depth=vit["depth"],
        width=vit["width"],
        heads=vit["heads"],
        patch_size=vit["patch_size"],
        stem="a convolutional stem with patches" if vit["stem"] else "linear patches",
        parameters=parameters,
        image_size="{} x {}".format(*preprocess["size"]),
        mode=preprocess["mode"],
        dim=dim,
        fingerprint=fingerprint,
        provenance=json.dumps({name: _brief(value) for name, value in config["provenance"].items()}, indent=2),
    )


def _brief(value: Any) -> Any:
    """Shorten a long list, such as the names of thousands of classes; config.json has it whole."""
    return [*value[:5], f"and {len(value) - 5} more"] if isinstance(value, list) and len(value) > 6 else value
