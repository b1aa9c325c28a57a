"""What token merging gives and costs: speed beside the exact network, and how far its embeddings move.

    vitembed train objects/ --out runs/objects --arch S/16 --stem linear --image-size 224 --epochs 14
    python benchmarks/merging.py runs/objects objects/

The model must be a trained one: a network with random weights embeds all images alike, so that its cosines say nothing.
All images of the folder are embedded exactly and with each number of merged tokens; the passes take turns within one
process, and a speed is a ratio of medians. About five minutes for S/16 and 300 images on two cores.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from timing import alternate, machine

from vitembed import Embedder
from vitembed.images import list_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--merge", type=int, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    exact = Embedder.from_pretrained(options.model)
    paths = list_images(options.images)
    models = {0: exact, **{merge: exact.replace(merge=merge) for merge in options.merge}}
    vectors = {merge: model.encode(paths) for merge, model in models.items()}
    pixels = torch.from_numpy(np.stack([exact.preprocess(path) for path in paths[: options.batch]]))

    def timed(model: Embedder) -> Callable[[], object]:
        return lambda: model.embed_pixels(pixels)

    times = alternate({str(merge): timed(model) for merge, model in models.items()}, repeats=options.repeats)
    others = vectors[0] @ vectors[0].T
    print(machine())
    print(
        f"{len(paths)} images, batches of {options.batch}; cosine of two different images: mean "
        f"{(others.sum() - np.trace(others)) / (others.size - len(others)):.3f}, standard deviation {others.std():.3f}"
    )
    print(f"{'merge':>6}{'images/s':>10}{'speed':>8}{'cosine: mean':>14}{'1st percentile':>16}{'lowest':>8}")
    for merge, found in vectors.items():
        cosines = (found * vectors[0]).sum(axis=1)
        speed = times["0"] / times[str(merge)]
        print(
            f"{merge:>6}{options.batch / times[str(merge)]:>10.1f}{speed:>7.2f}x{cosines.mean():>14.4f}"
            f"{np.percentile(cosines, 1):>16.4f}{cosines.min():>8.4f}"
        )


if __name__ == "__main__":
    main()
