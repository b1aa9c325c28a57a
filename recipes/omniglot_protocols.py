"""Three published protocols of Omniglot, by which `omniglot.py` judges: one-shot runs, few-shot episodes, pairs.

One-shot runs within an alphabet: Lake, Salakhutdinov and Tenenbaum 2015 (Science 350) and 2019 (arXiv:1902.03477).
Episodes of characters of any alphabet, rotations being classes: Vinyals et al. 2016 (arXiv:1606.04080). Verification of
pairs: Koch, Zemel and Salakhutdinov 2015, "Siamese neural networks for one-shot image recognition".
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitembed import metrics
from vitembed.embedder import Embedder
from vitembed.errors import DataError
from vitembed.training import ImageDataset

WAYS, TRIALS = 20, 200  # characters of a run; runs drawn for each alphabet
TASKS, QUERIES = ((20, 1), (20, 5), (5, 1), (5, 5)), 5  # ways and shots; images of a class that are named
PAIRS = 2000  # of each alphabet, half of them of one character


@dataclass(frozen=True)
class Drawings:
    """Drawings of characters.

    Attributes:
        images: whose classes are ALPHABET/CHARACTER.
        drawers: (N,) who drew each.
    """

    images: ImageDataset
    drawers: NDArray[np.int64]

    @classmethod
    def load(cls, folder: Path) -> "Drawings":
        """Read ALPHABET/CHARACTER/CCCC_DRAWER.png, after a download by torchvision if there is no such folder.

        Raises:
            DataError: if it cannot be downloaded, or is laid out otherwise.
        """
        if not folder.exists():
            from torchvision.datasets import Omniglot

            try:
                Omniglot(str(folder), background=True, download=True)
            except (OSError, RuntimeError) as error:
                raise DataError(f"{folder} does not exist, and Omniglot cannot be downloaded: {error}") from error
        downloaded = folder / "omniglot-py" / "images_background"
        images = ImageDataset.from_folder(downloaded if downloaded.is_dir() else folder)
        drawers = [Path(str(path)).stem.rpartition("_")[2] for path in images.images]
        if not all(drawer.isdecimal() for drawer in drawers) or any(name.count("/") != 1 for name in images.classes):
            raise DataError(f"{folder} is not Omniglot's: expected images ALPHABET/CHARACTER/CCCC_DRAWER.png")
        return cls(images, np.array(drawers, dtype=np.int64))

    @property
    def alphabet(self) -> NDArray[np.str_]:
        """(N,) the alphabet of each image."""
        return np.array([name.split("/")[0] for name in self.images.classes])[self.images.labels]

    @property
    def alphabets(self) -> list[str]:
        """The names of the alphabets, sorted."""
        return np.unique(self.alphabet).tolist()

    def of(self, alphabets: Sequence[str]) -> "Drawings":
        """Return the drawings of some alphabets."""
        if missing := sorted(set(alphabets) - set(self.alphabets)):
            raise DataError(f"no alphabet {missing[0]!r} here; there are {', '.join(self.alphabets)}")
        chosen = np.isin(self.alphabet, alphabets)
        return Drawings(self.images.subset(chosen), self.drawers[chosen])


def judge(model: Embedder, drawings: Drawings) -> dict[str, float]:
    """Return the figures of all protocols on characters that the model never saw."""
    vectors = model.encode(drawings.images.images, batch_size=256, workers=0)
    turned = drawings.images.with_rotations()
    of_turned = model.encode(turned.images, batch_size=256, workers=0)
    name = f"within-alphabet {WAYS}-way one-shot error"
    figures = {name: one_shot_error(vectors, drawings), f"{name}, all runs": expected_one_shot_error(vectors, drawings)}
    for ways, shots in TASKS:
        accuracy = metrics.few_shot_accuracy(of_turned, turned.labels, ways, shots, queries=QUERIES, episodes=1000)
        figures[f"{ways}-way {shots}-shot accuracy"] = float(accuracy.mean())
    return figures | {"verification accuracy": verification_accuracy(vectors, drawings)}


def one_shot_error(vectors: NDArray[np.float32], drawings: Drawings) -> float:
    """Return the share of wrong names in runs of one alphabet, two drawers and 20 characters, drawn by seed.

    One drawer's images are the examples, the other's are named after the nearest of them: Lake's protocol. Alphabets of
    fewer characters have no runs; the others count alike.
    """
    rng, errors = np.random.default_rng(0), []
    for table in tables(drawings):
        for _ in range(TRIALS):
            pair = rng.choice(table.shape[1], 2, replace=False)
            drawn = rng.choice(len(table), WAYS, replace=False)
            examples, asked = (vectors[table[drawn, drawer]] for drawer in pair)
            errors.append(error_of_run(asked @ examples.T, np.arange(WAYS)))
    return float(np.mean(errors))


def expected_one_shot_error(vectors: NDArray[np.float32], drawings: Drawings) -> float:
    """Return what `one_shot_error` is in the mean over all its runs: every two drawers, every 20 characters.

    A query is named rightly where none of the other 19 characters drawn is one of the k, of n in the alphabet, whose
    example is as near as the true one or nearer, which has the probability C(n - 1 - k, 19) / C(n - 1, 19).
    """
    of_alphabets = []
    for table in tables(drawings):
        others = len(table) - 1
        right = np.array([math.comb(others - nearer, WAYS - 1) for nearer in range(others + 1)], dtype=float)
        errors = []
        for examples, asked in itertools.permutations(table.T, 2):
            scores = vectors[asked] @ vectors[examples].T
            nearer = (scores >= scores.diagonal()[:, None]).sum(axis=1) - 1
            errors.append(1 - np.mean(right[nearer] / right[0]))
        of_alphabets.append(np.mean(errors))
    return float(np.mean(of_alphabets))


def tables(drawings: Drawings) -> list[NDArray[np.int64]]:
    """Return for each alphabet that has runs (characters, drawers), where the image of a character by a drawer is.

    Drawers who left out a character are left out.

    Raises:
        DataError: if no alphabet has enough characters, all of them by two drawers.
    """
    labels, found = drawings.images.labels, []
    place = {(label, drawer): at for at, (label, drawer) in enumerate(zip(labels, drawings.drawers, strict=True))}
    for alphabet in drawings.alphabets:
        characters = np.unique(labels[drawings.alphabet == alphabet])
        drawers = [one for one in np.unique(drawings.drawers) if all((label, one) in place for label in characters)]
        if len(characters) >= WAYS and len(drawers) >= 2:
            found.append(np.array([[place[label, drawer] for drawer in drawers] for label in characters]))
    if not found:
        raise DataError(
            f"no judged alphabet has {WAYS} characters, all of them by two drawers, as a one-shot run takes"
        )
    return found


def error_of_run(scores: NDArray[np.float32], truth: NDArray[np.int64]) -> float:
    """Return the share of the queries (rows) whose best example (column) is not the true one; a tie is wrong."""
    right = scores[np.arange(len(truth)), truth]
    return float(np.mean((scores >= right[:, None]).sum(axis=1) > 1))


def published_runs_error(model: Embedder, folder: Path) -> float:
    """Return the error over the runs of all_runs.zip: runNN/class_labels.txt has lines "TEST_IMAGE TRAINING_IMAGE"."""
    errors = []
    for listing in sorted(folder.glob("run*/class_labels.txt")):
        rows = [
            line.split() for line in listing.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        if len({row[-1] for row in rows}) != len(rows) or len(rows) < 2 or any(len(row) != 2 for row in rows):
            raise DataError(
                f"{listing} must have lines TEST_IMAGE TRAINING_IMAGE, each with a training image of its own"
            )
        asked, examples = zip(*rows, strict=True)
        vectors = model.encode([folder / name for name in (*asked, *examples)], workers=0)
        errors.append(error_of_run(vectors[: len(rows)] @ vectors[len(rows) :].T, np.arange(len(rows))))
    if not errors:
        raise DataError(f"{folder} holds no runs: expected run01/class_labels.txt and so on, as in all_runs.zip")
    return float(np.mean(errors))


def verification_accuracy(vectors: NDArray[np.float32], drawings: Drawings) -> float:
    """Return the share of pairs that a threshold tells right: Koch's protocol.

    Half of the pairs are two drawings of one character, half are of two characters of one alphabet, always by two
    drawers. The pairs of an alphabet are judged at the threshold that is best for those of the others.
    """
    if len(drawings.alphabets) < 2:
        raise DataError(f"{drawings.alphabets[0]} alone is judged; a threshold is chosen on others: name two at least")
    rng, right = np.random.default_rng(0), []
    scores = {name: draw_pairs(vectors, drawings, name, rng) for name in drawings.alphabets}
    for name, (same, different) in scores.items():
        others = [scores[other] for other in scores if other != name]
        alike, unlike = (np.sort(np.concatenate(kind)) for kind in zip(*others, strict=True))
        best = max(alike, key=lambda at: np.searchsorted(unlike, at) - np.searchsorted(alike, at))
        right += [*(same >= best), *(different < best)]
    return float(np.mean(right))


def draw_pairs(
    vectors: NDArray[np.float32], drawings: Drawings, alphabet: str, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the scores of PAIRS / 2 pairs of one character, and of as many of two characters of an alphabet."""
    of_alphabet = np.flatnonzero(drawings.alphabet == alphabet)
    left, right = rng.choice(of_alphabet, (2, 200 * PAIRS))
    is_same = drawings.images.labels[left] == drawings.images.labels[right]
    by_two = drawings.drawers[left] != drawings.drawers[right]
    same, different = (np.flatnonzero(kind & by_two)[: PAIRS // 2] for kind in (is_same, ~is_same))
    score = np.einsum("pd,pd->p", vectors[left[np.r_[same, different]]], vectors[right[np.r_[same, different]]])
    return score[: len(same)], score[len(same) :]
