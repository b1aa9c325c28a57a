"""Does jigsaw pre-training help when labels are few? Omniglot with and without it, judged on alphabets never seen.

Papers: jigsaw puzzles for ViT, Chen et al. 2022 (arXiv:2207.11971), here a task of its own before training; Omniglot,
Lake et al. 2015 (Science 350).

    python recipes/jigsaw.py --data images_background --out runs/jigsaw
    python recipes/jigsaw.py --data images_background --out runs/choice --judge validation --seeds 1

Data: Omniglot's images_background, ALPHABET/CHARACTER/IMAGE. The last five alphabets in sorted order are held out: they
are judged, and nothing was chosen on them. Pre-training sees the drawings of the other 25 without labels. A tenth of
their characters, drawn anew for each seed, is then all there is to train on with triplet loss: from random weights, and
from the pre-trained ones, in the same steps. Settings were judged on the five alphabets before the held-out ones, with
both fives left out of training (second command): from scratch a rate of 2e-3 found more than 1e-3 (recall@1 26.5
against 25.7 %, one seed); from jigsaw 1e-3 was the only one tried (55.9 %, after 4 passes of pre-training).

Expected, in 30 minutes on one core: half of the puzzle tiles placed (12 % by chance). Recall@1 on held-out alphabets is
39.1 % from scratch, 77.5 % from jigsaw: 38.4 points more, 95 % interval over characters 35.8 to 40.5, each of the three
seeds 36 or more. Equal error rate 12.9 against 7.3 %: 5.6 points less (4.9 to 6.5). The time of pre-training is extra;
whether as much time spent on longer training from scratch would do the same was not measured.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitembed import metrics
from vitembed.embedder import Embedder
from vitembed.files import atomic_write
from vitembed.preprocess import Preprocess
from vitembed.training import Augment, ImageDataset, TrainConfig, TripletLoss, train
from vitembed.training.jigsaw import JigsawConfig, pretrain_jigsaw

SIZE = 32  # pixels: 8 x 8 patches of 4, puzzles of 4 x 4 tiles of 2 x 2 patches
SHARE = 0.1  # of the characters that have labels
PAIRED = 6  # images of a character that are paired for the equal error rate; recall@1 takes all twenty
PUZZLES = JigsawConfig(epochs=5, tile=2, workers=0)
LABELLED = TrainConfig(16, 16, 4, augment=Augment.named("ink"), validation="none", workers=0)
ARMS = ("from scratch", "from jigsaw")


def main() -> None:
    """Pre-train once, train both arms for each seed, print what they differ by."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--judge", choices=["held-out", "validation"], default="held-out")
    parser.add_argument("--rates", type=float, nargs=2, default=[2e-3, 1e-3], help="learning rate of each arm")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    data = ImageDataset.load(args.data)
    alphabets = sorted({name.split("/")[0] for name in data.classes})
    end = len(alphabets) - (0 if args.judge == "held-out" else 5)
    pool, judged = of_alphabets(data, alphabets[: end - 5]), of_alphabets(data, alphabets[end - 5 : end])
    print(f"{len(pool)} images without labels; judged on {', '.join(alphabets[end - 5 : end])}", flush=True)
    checkpoint = args.out / "pretrained"
    result = pretrain_jigsaw(untrained(0), pool, config=PUZZLES, out=checkpoint, overwrite=True, progress=True)
    print(f"jigsaw: {result.accuracy:.1%} of the tiles of unseen images placed; chance {result.chance:.1%}", flush=True)
    print("pre-trained, no labels:", Judged(judged, Embedder.from_pretrained(checkpoint)), flush=True)

    runs: list[list[Judged]] = []
    for seed in range(args.seeds):
        number = round(SHARE * len(pool.classes))
        drawn = np.random.default_rng(seed).choice(len(pool.classes), number, replace=False)
        few = pool.subset(np.isin(pool.labels, drawn))
        runs.append([])
        for arm, rate in zip(ARMS, args.rates, strict=True):
            model = untrained(seed) if arm == ARMS[0] else Embedder.from_pretrained(checkpoint)
            config = replace(LABELLED, learning_rate=rate, seed=seed)
            train(model, few, loss=TripletLoss(0.2, "semihard"), config=config, progress=True)
            runs[-1].append(Judged(judged, model))
            print(f"seed {seed}, {number} characters, {arm}: {runs[-1][-1]}", flush=True)
    table = {name: compare(runs, name) for name in ("recall@1", "eer")}
    atomic_write(args.out / "comparison.json", json.dumps(table, indent=1) + "\n")
    for name, row in table.items():
        print(name, *(f"{key}: {value}" for key, value in row.items()), sep="\n    ")


def untrained(seed: int) -> Embedder:
    """Return the network of both arms with random weights."""
    return Embedder.create("N/4", preprocess=Preprocess.grey((SIZE, SIZE)), stem="conv", seed=seed)


def of_alphabets(data: ImageDataset, wanted: list[str]) -> ImageDataset:
    """Return the images of some alphabets."""
    return data.subset(np.array([name.split("/")[0] in wanted for name in data.classes])[data.labels])


class Judged:
    """What a model makes of the judged images: the hits of recall@1, and the scores of pairs."""

    def __init__(self, images: ImageDataset, model: Embedder) -> None:
        vectors = model.encode(images.images, batch_size=256, workers=0)
        ranks = metrics.query_ranks(vectors, images.labels)
        self.hits, self.characters = ranks.first_rank == 1, images.labels[ranks.queries]
        few = np.concatenate([np.flatnonzero(images.labels == label)[:PAIRED] for label in range(len(images.classes))])
        self.scores, self.is_match = metrics.pair_scores(vectors[few], images.labels[few])
        self.pairs = images.labels[few][np.stack(np.triu_indices(len(few), 1), axis=1)]  # (P, 2)

    def figure(self, name: str, at: NDArray[np.int64] | slice = slice(None)) -> float:
        """Return recall@1, or the equal error rate, of the drawn queries or pairs."""
        if name == "recall@1":
            return float(self.hits[at].mean())
        return metrics.equal_error_rate(self.scores[at], self.is_match[at])[0]

    def __str__(self) -> str:
        return f"recall@1 {self.figure('recall@1'):.2%}, equal error rate {self.figure('eer'):.2%}"


def compare(runs: list[list[Judged]], name: str) -> dict[str, object]:
    """Return a figure of both arms by seed, their paired difference, and its interval over the judged characters."""
    scratch, jigsaw = ([run[arm].figure(name) for run in runs] for arm in (0, 1))
    items = runs[0][0].characters if name == "recall@1" else runs[0][0].pairs
    interval = metrics.bootstrap_interval(
        lambda at: float(np.mean([run[1].figure(name, at) - run[0].figure(name, at) for run in runs])), items
    )
    rows = {ARMS[0]: scratch, ARMS[1]: jigsaw, "difference": np.subtract(jigsaw, scratch).tolist()}
    return {
        **{f"{arm}, mean": round(float(np.mean(values)), 4) for arm, values in rows.items()},
        "difference, 95 % over characters": [round(bound, 4) for bound in interval],
        **{f"{arm}, by seed": [round(value, 4) for value in values] for arm, values in rows.items()},
        "difference, standard deviation over seeds": round(float(np.std(rows["difference"], ddof=len(runs) > 1)), 4),
    }


if __name__ == "__main__":
    main()
