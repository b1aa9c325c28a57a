"""How fast a training step is, beside the bare network and a plain loop of timm and pytorch-metric-learning.

    python benchmarks/train.py                            # S/16, 224 x 224, float32, batches of 32, on the processor
    python benchmarks/train.py --arch Ti/16 --batch 16
    python benchmarks/train.py --cache                    # and the peak memory of a step of 1024 with gradient caching
    python benchmarks/train.py --device cuda              # bfloat16, batches of 512; files and large losses, too

A step is all that training does with a batch: changes to the pixels (none here), network, triplet loss, backward pass,
clipping, AdamW. "bare ViT" is the network alone, forward and backward from the sum of its outputs. The peer is timm's
network of the same weights, with pytorch-metric-learning's miner and loss and AdamW; it gets pixels that are normalised
already. That both begin with the same loss is checked. All take turns within one process; a figure is the ratio of
medians. Five minutes on two cores; `--cache` takes 15 more there, in a process of its own.

With files (`--files`, the default on a GPU), JPEG files of 256 x 256 are written to a temporary folder and trained on;
what is measured is the share of the time that finished steps wait for the next batch, once the first has come.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from losses import high_water
from PIL import Image
from pytorch_metric_learning import losses, miners
from timing import alternate, machine, print_ratios
from torch import Tensor, nn

from vitembed.embedder import Embedder
from vitembed.embedding_net import EmbeddingNet
from vitembed.preprocess import Preprocess
from vitembed.training import ImageDataset, TrainConfig, TripletLoss
from vitembed.training.data import pixels
from vitembed.training.data.pixels import LabelledPixels, PixelDataset
from vitembed.training.data.sampling import ClassBalancedSampler
from vitembed.training.learner import Learner
from vitembed.vit import ViT

TIMM = {"Ti/16": "tiny_patch16", "S/16": "small_patch16", "B/16": "base_patch16", "B/32": "base_patch32"}
MARGIN = 0.2
IMAGES_PER_CLASS = 4
RATE = 1e-5  # low: a step costs the same, and the weights stay where all triplets count
BAR = 1.05

Step = Callable[[], Tensor]


def batch(size: int, args: argparse.Namespace) -> LabelledPixels:
    """Return noise, (size, 3, H, W) uint8, of a class for every four images, and of two classes at least."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (size, 3, args.image_size, args.image_size), dtype=torch.uint8, generator=random)
    return LabelledPixels(noise, torch.arange(size) // min(IMAGES_PER_CLASS, size // 2), torch.arange(size))


def embedder(args: argparse.Namespace) -> Embedder:
    """Return the untrained model."""
    return Embedder.create(args.arch, preprocess=Preprocess((args.image_size, args.image_size)), device=args.device)


def learner(model: Embedder, args: argparse.Namespace, chunk: int | None = None) -> Learner:
    """Return what trains a model, with `chunk` images at a time in the gradient cache."""
    config = TrainConfig(learning_rate=RATE, warmup=0, precision=args.precision, gradient_cache=chunk)
    model.network.train()
    return Learner(model, TripletLoss(MARGIN, "all"), None, config, steps=1_000_000)


def our_step(model: Embedder, data: LabelledPixels, args: argparse.Namespace) -> Step:
    """Return a step of ours."""
    data = LabelledPixels(*(tensor.to(args.device) for tensor in data))
    training = learner(model, args)
    return lambda: finished(training.step(data).figures["loss"])


def peer_step(network: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Step:
    """Return a step of a plain loop, on normalised images."""
    miner = miners.TripletMarginMiner(margin=MARGIN, type_of_triplets="all")
    loss_function = losses.TripletMarginLoss(margin=MARGIN)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05)

    def run() -> Tensor:
        with autocast(args):
            embeddings = network(images)
        embeddings = embeddings.float()
        loss = loss_function(embeddings, labels, miner(embeddings, labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return finished(loss.detach())

    return run


def bare_step(network: ViT, images: Tensor, args: argparse.Namespace) -> Step:
    """Return the forward and backward pass of the network alone."""

    def run() -> Tensor:
        with autocast(args):
            total = network(images).cls.sum()
        total.backward()
        network.zero_grad()
        return finished(total.detach())

    return run


def autocast(args: argparse.Namespace) -> torch.autocast:
    """Return the context of the wanted precision."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


def finished(value: Tensor) -> Tensor:
    """Wait until a GPU has done what it was told."""
    if value.is_cuda:
        torch.cuda.synchronize(value.device)
    return value


def in_timm(network: EmbeddingNet, args: argparse.Namespace) -> nn.Module:
    """Return timm's network with the same weights, which gives the CLS token where it has no classes."""
    model = timm.create_model(f"vit_{TIMM[args.arch]}_224", num_classes=0, img_size=args.image_size)
    model.load_state_dict(network.vit.state_dict())
    return model.to(args.device).train()


def compare(args: argparse.Namespace) -> None:
    """Print the seconds of a step of each, and the ratios."""
    data = batch(args.batch, args)
    model = embedder(args)
    network = model.network
    images = network.normalise(data.pixels.to(args.device))
    bare = ViT(network.vit.config).to(args.device).train()
    steps = {
        "peer": peer_step(in_timm(network, args), images, data.labels.to(args.device), args),
        "bare ViT": bare_step(bare, images, args),
        "vitembed": our_step(model, data, args),
    }
    first = {name: steps[name]().item() for name in ("vitembed", "peer")}
    if abs(first["vitembed"] / first["peer"] - 1) > (1e-3 if args.precision == "fp32" else 3e-2):
        raise SystemExit(f"the losses differ, nothing to compare: {first}")
    times = alternate(steps, repeats=args.repeats)
    print(f"{args.arch}, {args.image_size} x {args.image_size}, {args.precision}, batches of {args.batch}")
    print_ratios(times, ours="vitembed", per=args.batch, unit="images/s")
    print(f"a step takes {times['vitembed'] / times['bare ViT']:.3f} of the bare ViT's time; the bar is {BAR}")
    print(f"the plain loop takes {times['peer'] / times['vitembed']:.3f} of our step's time")


def compare_memory(args: argparse.Namespace) -> None:
    """Print the peak memory of one step of a large batch with gradient caching."""
    command = [sys.executable, __file__, "--measure", "--arch", args.arch, "--image-size", str(args.image_size)]
    command += ["--cache-batch", str(args.cache_batch), "--chunk", str(args.chunk)]
    command += ["--device", args.device, "--precision", args.precision]
    before, peak, seconds = map(float, subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split())
    print(f"one step of {args.cache_batch} images, {args.chunk} at a time: {seconds:.0f} s")
    print(f"peak memory {peak:.2f} GB of the whole process, {before:.2f} GB of it before the step; the bar is 4 GB")


def measure(args: argparse.Namespace) -> None:
    """Print memory before and at the peak of one step in GB, and its seconds."""
    training = learner(embedder(args), args, chunk=args.chunk)
    data = batch(args.cache_batch, args)
    is_cuda = args.device.startswith("cuda")
    before = torch.cuda.max_memory_allocated() if is_cuda else high_water() * 1024
    started = time.perf_counter()
    finished(training.step(data).figures["loss"])
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if is_cuda else high_water() * 1024
    print(before / 1e9, peak / 1e9, seconds)


def write_files(folder: Path, count: int) -> ImageDataset:
    """Write JPEG files of 256 x 256 of about 20 kB, as photographs have it, and return them with their classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize((256, 256))
        grain = rng.normal(0, 8, (256, 256, 1))
        path = folder / str(number // IMAGES_PER_CLASS) / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(path, quality=85)
    return ImageDataset.from_folder(folder)


def waits(batches: Iterator[LabelledPixels], training: Learner) -> Iterator[tuple[float, float, int]]:
    """Yield the seconds that each batch but the first was waited for, those of its step, and how many images it has."""
    training.step(next(batches))
    ended = time.perf_counter()
    for data in batches:
        came = time.perf_counter()
        finished(training.step(data).figures["loss"])
        yield came - ended, time.perf_counter() - came, len(data.labels)
        ended = time.perf_counter()


def train_on_files(args: argparse.Namespace) -> None:
    """Print how long steps wait for data that are read from files."""
    pixels.MAX_CACHE_BYTES = 0  # so that they are read from files, few as they are
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_files(Path(folder), args.files)
        model = embedder(args)
        source = PixelDataset(dataset, model.preprocess)
        classes = max(2, args.batch // IMAGES_PER_CLASS)
        sampler = ClassBalancedSampler(
            dataset.labels, classes_per_batch=classes, images_per_class=IMAGES_PER_CLASS, seed=0
        )
        batches = iter(source.batches(sampler, workers=args.workers))
        waited, stepped, images = (sum(part) for part in zip(*waits(batches, learner(model, args)), strict=True))
    rate = images / (waited + stepped)
    print(f"from {args.files} JPEG files with {args.workers} workers: {rate:.1f} images/s")
    print(f"waits for data: {waited / (waited + stepped):.1%} of the time")


def large_losses(args: argparse.Namespace) -> None:
    """Print seconds and peak memory of the exact loss of large batches, by the benchmark of losses."""
    command = [sys.executable, str(Path(__file__).parent / "losses.py"), "--device", args.device]
    command += ["--sizes", "--against", "--alone", *map(str, args.losses)]
    print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout, end="")


def parse() -> argparse.Namespace:
    """Return the options; those that depend on the device are filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="S/16", choices=sorted(TIMM))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, help="images in a step; 32, and 512 on a GPU")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds, in which each has one turn")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="fp32, and bf16 on a GPU")
    parser.add_argument("--cache", action="store_true", help="measure gradient caching, too")
    parser.add_argument("--cache-batch", type=int, default=1024, help="images in its step")
    parser.add_argument("--chunk", type=int, default=32, help="images at a time in it")
    parser.add_argument("--files", type=int, help="JPEG files to train on; 0 on a processor, 16384 on a GPU")
    parser.add_argument("--workers", type=int, default=8, help="processes that decode them")
    parser.add_argument(
        "--losses", type=int, nargs="*", help="batches of the loss alone; none, and 16384 65536 on a GPU"
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    is_cpu = args.device == "cpu"
    args.batch = args.batch or (32 if is_cpu else 512)
    args.precision = args.precision or ("fp32" if is_cpu else "bf16")
    args.files = args.files if args.files is not None else (0 if is_cpu else 16384)
    args.losses = args.losses if args.losses is not None else ([] if is_cpu else [16384, 65536])
    return args


def main() -> None:
    """Measure what the options ask for."""
    args = parse()
    if args.measure:
        measure(args)
        return
    print(machine(), flush=True)
    compare(args)
    if args.cache:
        compare_memory(args)
    if args.files:
        train_on_files(args)
    if args.losses:
        large_losses(args)


if __name__ == "__main__":
    main()
