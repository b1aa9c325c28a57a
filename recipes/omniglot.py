"""Omniglot from nothing: a small ViT that tells characters of alphabets it never saw, by three published protocols.

Papers: the data and its one-shot runs, Lake et al. 2015 (Science 350) and 2019 (arXiv:1902.03477, from which the
published one-shot errors are); episodes, Vinyals et al. 2016 (arXiv:1606.04080); verification, Koch et al. 2015
("Siamese neural networks for one-shot image recognition"); multi-similarity loss, Wang et al. 2019 (arXiv:1904.06627);
Muon, Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/).

    python recipes/omniglot.py --data images_background --out runs/omniglot
    python recipes/omniglot.py --data images_background --out runs/all --test images_evaluation --runs all_runs
    python recipes/omniglot.py --data images_background --out runs/five --minimal --precision fp32

Data: images_background, ALPHABET/CHARACTER/CCCC_DRAWER.png; torchvision downloads it if the folder does not exist. The
last five alphabets in sorted order are held out and judged; the settings below were chosen on them, so that figures of
others are what counts in the end: of --test, of --runs (the published ones, all_runs.zip of the same authors) or of
another --held-out. With --held-out and no name all 30 are trained on, which makes the model that ships. Every
character turned by 90, 180 and 270 degrees is a class of its own. A run that was stopped goes on when it is started
again; one that is finished is only judged anew.

Three teachers learn from labels; the student begins as the first of them and learns from all three which drawings are
alike. Labels say of two characters of one shape that they differ as any others do; and each teacher errs in its own
way. With --minimal, where five alphabets are few, all teachers begin as one network that was trained on 60 that nobody
wrote (generated_characters.py); --generated changes their number or leaves them out.

Expected, seed 0, one core (one thread; bf16 instructions): 56 minutes for the first teacher, 15 for each other, 18 for
the student. One-shot error within an alphabet 4.5 %, over all possible runs 4.4 % (the first teacher alone 5.6 and 5.1
%); 20-way 1-shot over all characters 98.2 %; verification 97.5 %, at a threshold chosen on other alphabets. --minimal:
one-shot error 8.1 %, over all runs 7.9 %; 45 minutes, one core. Some processors are faster with --precision fp32 (1.5
against 2.0 s a batch on a Xeon without AMX). benchmarks/RESULTS.md has what was tried.
"""

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from generated_characters import generated_characters  # beside this recipe, as the next
from omniglot_protocols import Drawings, judge, published_runs_error

from vitembed.architecture import ViTConfig
from vitembed.embedder import Embedder
from vitembed.errors import VitembedError
from vitembed.files import atomic_write
from vitembed.preprocess import Preprocess
from vitembed.training import Augment, DistillationLoss, ImageDataset, TrainConfig, build_loss, train

PREPROCESS = Preprocess.grey((40, 40), scan=True)  # the ink cut out and centred: place and size are the drawer's
NETWORK = ViTConfig(
    image_size=PREPROCESS.size,
    patch_size=8,
    channels=1,
    width=192,
    depth=2,
    heads=3,
    mlp_width=384,
    stem=((64, 1), (64, 2), (128, 1), (128, 2), (192, 1), (192, 2)),
)
LOSS = "MultiSimilarityLoss(alpha=2, beta=50, base=0.5)"
TRAINING = TrainConfig(
    epochs=10,
    classes_per_batch=32,
    images_per_class=8,
    categories_per_batch=2,  # alphabets, as they are turned: what must be told apart meets
    optimizer="muon",
    learning_rate=5e-3,
    augment=replace(Augment.named("ink"), elastic=0.01, stroke=0.25),
    precision="bf16",
    validation="none",
    workers=0,
)
GENERATED = 60  # alphabets that nobody wrote, where there are five that somebody did
PRETRAINING = replace(TRAINING, epochs=7)  # on them
TEACHERS = (1.0, 0.3, 0.3)  # shares of the epochs for which each is trained: short ones err elsewhere, and cost little
STUDENT = replace(TRAINING, learning_rate=2e-3)
STUDYING = 0.2  # share of the epochs
MINIMAL = ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")  # images_background_small1 of the data's authors
RUNS, ONE_SHOT = "published runs, one-shot error", "within-alphabet 20-way one-shot error"
PUBLISHED = {  # all of the ten evaluation alphabets
    RUNS: "humans 4.5 %, BPL 3.3 %, Siamese net 8.0 %, deep ConvNet 13.5 %, ARC 1.5 %",
    ONE_SHOT: "humans 4.5 %, BPL 3.3 %, Siamese net 8.0 %, deep ConvNet 13.5 %, ARC 1.5 %",
    "20-way 1-shot accuracy": "matching nets 93.8 %, prototypical nets 96.0 %, relation nets 97.6 %",
    "verification accuracy": "Siamese net 93.4 %",
}
PUBLISHED_MINIMAL = dict.fromkeys((RUNS, ONE_SHOT), "with five alphabets BPL 4.2 %, deep ConvNet 23.2 %")


def main() -> None:
    """Read the arguments; an error is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="images_background; downloaded if it does not exist")
    parser.add_argument("--out", type=Path, required=True, help="folder of the models and of figures.json")
    parser.add_argument("--test", type=Path, help="images_evaluation: all its alphabets are judged, none is held out")
    parser.add_argument("--runs", type=Path, help="the published runs, all_runs.zip unpacked")
    parser.add_argument("--held-out", nargs="*", metavar="ALPHABET", help="the last five; none for the model to ship")
    parser.add_argument("--minimal", action="store_true", help=f"train on {', '.join(MINIMAL)} alone")
    parser.add_argument(
        "--generated", type=int, metavar="ALPHABETS", help=f"to begin with: {GENERATED} with --minimal, else 0"
    )
    parser.add_argument("--epochs", type=int, default=TRAINING.epochs, help="of the first teacher; others have a share")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--precision", default=TRAINING.precision, help="or fp32, which is faster on some processors")
    args = parser.parse_args()
    try:
        run(args)
    except (VitembedError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; the same command goes on from the last checkpoint\n")


def run(args: argparse.Namespace) -> None:
    """Train a network for each seed, judge it, print the figures beside the published ones."""
    replace(TRAINING, epochs=args.epochs, precision=args.precision)  # what is wrong is told now, not after an hour
    data = Drawings.load(args.data)
    held_out = ([] if args.test else data.alphabets[-5:]) if args.held_out is None else args.held_out
    learned = [name for name in (MINIMAL if args.minimal else data.alphabets) if name not in held_out]
    pool = data.of(learned).images.with_rotations()
    unseen = Drawings.load(args.test) if args.test else data.of(held_out) if held_out else None
    if unseen:
        print(f"trained on {len(learned)} alphabets, judged on {', '.join(unseen.alphabets)}", flush=True)
    report = args.out / "figures.json"
    figures = json.loads(report.read_text()) if report.exists() else {}
    untrained = Embedder.create(NETWORK, preprocess=PREPROCESS)
    tell("untrained", judged(untrained, unseen, args.runs))  # what cannot be judged is told now, not after an hour
    for seed in args.seeds:
        start = pretrained(seed, args)
        teachers = [taught(start, pool, seed, number, args) for number in range(len(TEACHERS))]
        tell(f"seed {seed}, the first teacher alone", judged(teachers[0], unseen, args.runs))
        folder = args.out / f"seed{seed}"
        model = Embedder.from_pretrained(teacher_folder(folder, 0))
        config = replace(STUDENT, epochs=part(args.epochs, STUDYING), precision=args.precision, seed=seed)
        train(model, pool, loss=DistillationLoss(teachers), config=config, out=folder, resume=True, progress=True)
        figures[str(seed)] = judged(model, unseen, args.runs)
        tell(f"seed {seed}", figures[str(seed)])
        atomic_write(report, json.dumps(figures, indent=1) + "\n")
    published = PUBLISHED_MINIMAL if args.minimal else PUBLISHED
    for name in figures[str(args.seeds[0])]:
        values = [figures[str(seed)][name] for seed in args.seeds]  # others in the file may be of other settings
        spread = f" +- {np.std(values, ddof=1):.2%}" if len(values) > 1 else ""
        print(
            f"{name}: {np.mean(values):.2%}{spread}" + (f"; published: {published[name]}" if name in published else "")
        )


def pretrained(seed: int, args: argparse.Namespace) -> Embedder | None:
    """Return the network after training on characters that nobody drew; None where none are wanted."""
    alphabets = (GENERATED if args.minimal else 0) if args.generated is None else args.generated
    if not alphabets:
        return None
    print(f"seed {seed}: {alphabets} alphabets are generated, and trained on first", flush=True)
    model = Embedder.create(NETWORK, preprocess=PREPROCESS, seed=seed)
    config = replace(PRETRAINING, precision=args.precision, seed=seed)
    out, pool = args.out / f"seed{seed}-generated", generated_characters(alphabets, seed=seed)
    train(model, pool, loss=build_loss(LOSS), config=config, out=out, resume=True, progress=True)
    return model


def taught(start: Embedder | None, pool: ImageDataset, seed: int, number: int, args: argparse.Namespace) -> Embedder:
    """Train the teacher of a number on labels: from random weights of its own if there is nothing to begin with."""
    own = seed + 1000 * number
    model = copy.deepcopy(start) if start is not None else Embedder.create(NETWORK, preprocess=PREPROCESS, seed=own)
    config = replace(TRAINING, epochs=part(args.epochs, TEACHERS[number]), precision=args.precision, seed=own)
    folder = teacher_folder(args.out / f"seed{seed}", number)
    train(model, pool, loss=build_loss(LOSS), config=config, out=folder, resume=True, progress=True)
    return model


def teacher_folder(folder: Path, number: int) -> Path:
    """Return where the teacher of a number is, beside its student."""
    return folder.with_name(f"{folder.name}-teacher{number}")


def part(epochs: int, share: float) -> int:
    """Return a share of the epochs, one at least."""
    return max(1, round(share * epochs))


def judged(model: Embedder, unseen: Drawings | None, runs: Path | None) -> dict[str, float]:
    """Return the figures on unseen drawings, and on the published runs, where there are any."""
    figures = judge(model, unseen) if unseen else {}
    return {**figures, RUNS: published_runs_error(model, runs)} if runs else figures


def tell(whose: str, figures: dict[str, float]) -> None:
    """Print figures, a line each."""
    print(whose, *(f"{name}: {value:.2%}" for name, value in figures.items()), sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
