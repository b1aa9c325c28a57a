"""What reading costs: images a second from JPEG files to embeddings, beside the network on pixels in memory.

    python benchmarks/files.py                           # S/16, 192 JPEG files of 500 x 375, batches of 16
    python benchmarks/files.py --data photos --batch 64  # your own files
    python benchmarks/files.py --side 2000 --images 64   # large ones, whose decoding takes longer
    python benchmarks/files.py --device cuda --precision bf16 --batch 256 --images 20000

`Embedder.encode` of the paths and `Embedder.embed_pixels` of the same images, prepared beforehand, take turns within
one process; the share is the ratio of medians. Starting the threads that read counts. About two minutes.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import alternate, machine, print_ratios

from vitembed.embedder import Embedder
from vitembed.images import list_images


def make_jpegs(folder: Path, count: int, side: int) -> list[Path]:
    """Write photographs of a kind, side x 0.75 side: gradients, soft blobs and the noise of a sensor, quality 90."""
    rng = np.random.default_rng(0)
    width, height = side, side * 3 // 4
    across, down = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    paths = [folder / f"{number:06d}.jpg" for number in range(count)]
    for path in paths:
        small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        blobs = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
        light = rng.uniform(-60, 60, 3) * across + rng.uniform(-60, 60, 3) * down
        values = blobs + light + rng.normal(0, 6, (height, width, 1))
        Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def measure(model: Embedder, paths: list[Path], options: argparse.Namespace) -> None:
    """Time both ways in turn and print their rates, and what one thread takes to prepare an image."""
    size, batch = len(paths), options.batch
    started = time.process_time()
    pixels = torch.from_numpy(np.stack([model.preprocess(path) for path in paths]))
    preparing = (time.process_time() - started) / size

    def from_files() -> np.ndarray:
        return model.encode(paths, batch_size=batch, workers=options.workers)

    def in_memory() -> np.ndarray:
        return np.concatenate([model.embed_pixels(part) for part in pixels.split(batch)])

    difference = np.abs(from_files() - in_memory()).max()
    assert difference < (1e-5 if options.precision == "fp32" else 1e-2), f"two results for one file: {difference}"
    times = alternate({"from files": from_files, "in memory": in_memory}, repeats=options.repeats, warmup=1)
    with Image.open(paths[0]) as first:
        print(f"{machine()}, {options.device}")
        print(f"{options.arch}, {size} files (the first {first.width} x {first.height}), batches of {batch}")
    print_ratios(times, ours="from files", per=size, unit="images/s")
    print(f"decoding and resizing: {1000 * preparing:.2f} ms an image in one thread")
    print(f"from files to embeddings: {times['in memory'] / times['from files']:.3f} of the in-memory rate")


def main() -> None:
    """Read the options, make the files where none are given, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="S/16")
    parser.add_argument("--data", type=Path, help="a folder of images; without it, JPEG files are made for the time")
    parser.add_argument("--images", type=int, default=192, help="how many files, at the most")
    parser.add_argument("--side", type=int, default=500, help="longer side of the files that are made")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, help="threads that read; the default is the library's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    options = parser.parse_args()

    made = Embedder.create(options.arch, device=options.device)
    model = Embedder(made.network, made.preprocess, device=options.device, precision=options.precision)
    with tempfile.TemporaryDirectory() as folder:
        found = list_images(options.data) if options.data else make_jpegs(Path(folder), options.images, options.side)
        measure(model, found[: options.images], options)


if __name__ == "__main__":
    main()
