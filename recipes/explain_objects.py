"""Pictures of what a small model looks at: attention rollout over a photograph, and what two photographs share.

Papers: attention rollout is of Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020,
arXiv:2005.00928); the shares of the patches follow Ali et al., "XAI for Transformers: Better Explanations through
Conservative Propagation" (2022, arXiv:2202.07304).

Data: a folder CLASS/IMAGE. The pictures of the README are of six classes of Caltech-101 (Li, Andreetto, Ranzato and
Perona, CaltechDATA 2022, CC BY 4.0); whoever shows them names these authors and the licence.

    python recipes/explain_objects.py --data objects/ --out docs/images/ --of dollar_bill

Trains a ViT N/8 with a convolutional stem from scratch, triplet loss, 40 epochs of 96-pixel images; a fifth of the
images of every class is held out, and the pictures are made of those. With 327 images this takes about 4 minutes on a
processor core and gives a recall@1 of about 0.78 on the held-out images, where chance is 0.18: enough for pictures, no
measure of the method. Writes explain-rollout.jpg and explain-pair.jpg, each below 150 KB, and prints the figures.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from vitembed.embedder import Embedder
from vitembed.explain import attention_maps, explain_pair
from vitembed.explain.pictures import draw_rollout, draw_shared
from vitembed.files import atomic_write
from vitembed.preprocess import Preprocess
from vitembed.training import Augment, ImageDataset, TrainConfig, train

SETTINGS = TrainConfig(
    epochs=40,
    classes_per_batch=6,
    images_per_class=8,
    validation="images",
    augment=Augment.named("photo"),
    workers=0,  # the images are few: read once, by this process
    seed=0,
)
LARGEST = 150_000  # bytes of a picture


def main() -> None:
    """Train or load a model, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder CLASS/IMAGE")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--of", help="the class whose first two held-out images are drawn; the first class by default")
    parser.add_argument(
        "--model", type=Path, help="keep the model here; one that is there already is not trained again"
    )
    arguments = parser.parse_args()

    dataset = ImageDataset.load(arguments.data)
    _, held_out = dataset.split("images", share=SETTINGS.validation_share, seed=SETTINGS.seed)  # as `train` splits it
    chosen = arguments.of or dataset.classes[0]
    shown = held_out.with_classes([chosen]) if held_out else None
    if shown is None or len(shown) < 2:
        parser.error(f"fewer than two images of {chosen!r} are held out; there are {', '.join(dataset.classes)}")
    pair = [Path(image) for image in shown.images[:2]]

    model = trained(dataset, arguments.model)
    (heat,) = attention_maps(model, pair[:1])
    shared = explain_pair(model, *pair)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_jpeg(arguments.out / "explain-rollout.jpg", draw_rollout(model.preprocess, pair[0], heat))
    write_jpeg(arguments.out / "explain-pair.jpg", draw_shared(model.preprocess, pair, shared))
    figures = {name: value for name, value in shared.to_dict().items() if isinstance(value, float)}
    recall = model.provenance.get("validation recall@1")
    strongest = [int(at) for at in np.unravel_index(heat.argmax(), heat.shape)]
    print(json.dumps({"images": [image.name for image in pair], "recall@1": recall, "strongest": strongest, **figures}))


def trained(dataset: ImageDataset, folder: Path | None) -> Embedder:
    """Return the model of the folder, or a new one, which is saved there if there is a folder."""
    if folder is not None and folder.is_dir():
        return Embedder.from_pretrained(folder)
    model = Embedder.create("N/8", preprocess=Preprocess((96, 96)), stem="conv", seed=SETTINGS.seed)
    train(model, dataset, config=SETTINGS, out=folder, progress=True)
    return model


def write_jpeg(path: Path, png: bytes) -> None:
    """Write a drawn picture as the best JPEG that is not too large for a repository."""
    with Image.open(io.BytesIO(png)) as opened:
        picture = opened.convert("RGB")
    for quality in (92, 85, 75, 60, 40):
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=quality, optimize=True)
        if buffer.tell() < LARGEST:
            break
    atomic_write(path, buffer.getvalue())


if __name__ == "__main__":
    main()
