"""A training that is killed at random moments, and resumed each time, ends with the weights of one that never was.

    python benchmarks/kills.py                  # 20 kills of a short run: about five minutes
    python benchmarks/kills.py --kills 100 --seed 1

The run has all that must be remembered: AdamW, a moving average, a cross-batch memory, hard negatives, patch dropout,
a gradient cache, augmentation. Each process is sent SIGKILL after a random time that covers its start, its steps and
its writing of checkpoints, until enough kills have hit; the last one is left to finish. Then the fingerprints of the
weights and the histories are compared with an uninterrupted run's; the exit status says whether they are the same.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = """
import sys
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from vitembed.embedder import Embedder
from vitembed.preprocess import Preprocess
from vitembed.training import (
    Augment, CrossBatchMemory, HardNegatives, ImageDataset, Safeguards, TrainConfig, TripletLoss, train
)
from vitembed.vit import ViTConfig

random = np.random.default_rng(0)
patterns = random.uniform(0, 255, (12, 16, 16))
images = [np.clip(p + random.normal(0, 60, p.shape), 0, 255).astype(np.uint8) for p in patterns for _ in range(10)]
dataset = ImageDataset.from_arrays(images, np.repeat(np.arange(12), 10).tolist())
model = Embedder.create(
    ViTConfig((16, 16), 4, 1, width=32, depth=3, heads=2),
    preprocess=Preprocess.grey((16, 16), resize="squash", invert=False), seed=0, device="cpu",
)
config = TrainConfig(
    epochs=int(sys.argv[2]), classes_per_batch=4, images_per_class=5, augment=Augment.named("photo"), ema=0.95,
    hard_negatives=HardNegatives(every=3), patch_dropout=0.2, gradient_cache=8, workers=0,
    safeguards=Safeguards(checkpoint_steps=2, on_collapse="warn"),
)
loss = CrossBatchMemory(TripletLoss(), size=100, warmup=10)
print("started", flush=True)
train(model, dataset, loss=loss, config=config, out=Path(sys.argv[1]), resume=True)
print(model.fingerprint, flush=True)
"""


def start(out: Path, epochs: int) -> "subprocess.Popen[str]":
    """Start the run, or go on with it, and wait until its libraries are loaded."""
    command = [sys.executable, "-c", RUN, str(out), str(epochs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n", "the run did not start"
    return process


def finish(process: "subprocess.Popen[str]", out: Path) -> tuple[str, list[dict[str, float]]]:
    """Wait for the end and return the fingerprint of the weights and the history without its times."""
    output, _ = process.communicate()
    assert process.returncode == 0, f"the run ended with {process.returncode}"
    history = json.loads((out / "history.json").read_text())
    return output.strip(), [{name: v for name, v in record.items() if name != "seconds"} for record in history]


def main() -> int:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--window", type=float, default=6.0, help="seconds within which a process is killed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, pieces = Path(folder) / "whole", Path(folder) / "pieces"
        began = time.perf_counter()
        expected = finish(start(whole, args.epochs), whole)
        length = time.perf_counter() - began
        print(f"uninterrupted: {length:.1f} s, {len(expected[1])} epochs, fingerprint {expected[0][:12]}")
        kills = 0
        while kills < args.kills:
            process = start(pieces, args.epochs)
            time.sleep(moments.uniform(0, args.window))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if process.returncode == 0:
                break
            kills += 1
            reached = sorted((pieces / "checkpoints").glob("step-*.pt"))
            print(f"kill {kills}: last checkpoint {reached[-1].stem if reached else 'none'}", flush=True)
        found = finish(start(pieces, args.epochs), pieces)
    same = found == expected
    print(f"{kills} kills: weights and history {'are the same, to the bit' if same else 'DIFFER'}")
    return 0 if same and kills == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
