"""`vitembed demo`: the whole job on real images, in a few minutes, with nothing downloaded.

The images are the 1,797 handwritten digits that come with scikit-learn (8 x 8 pixels; the test part of Alpaydin and
Kaynak's "Optical Recognition of Handwritten Digits", UCI, CC BY 4.0). A small hybrid ViT is trained with triplet loss
on the first 1,200 and judged on the 597 that follow, which it never saw: as a verifier and as a search, beside raw
pixels and the untrained network. Then an index is made of files, searched, and pairs are verified.

The settings were chosen on parts of the first 1,200 alone.
"""

import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitembed import plots
from vitembed.embedder import Embedder
from vitembed.errors import VitembedError
from vitembed.evaluate import EvaluationReport, RetrievalReport, evaluate_embeddings
from vitembed.explain import attention_maps
from vitembed.files import atomic_write
from vitembed.images import load_image
from vitembed.index import Hit, Index, sync
from vitembed.metrics import pair_scores
from vitembed.preprocess import Preprocess
from vitembed.report import Page, Tile
from vitembed.training import Augment, ImageDataset, TrainConfig, TrainResult, TripletLoss, train
from vitembed.verify import Decision, Pairs, Verifier

TRAINED = 1200  # the first images; the rest is never seen in training
CHOOSING = 120  # of these, the last ones choose the best epoch and the verifier's threshold
QUERIES = 97  # of the unseen images, the last ones are searched for among the others
NEIGHBOURS = 6  # hits of a query
SHOWN = 8  # queries in the report
FAR = 0.01  # the false-accept rate that the verifier's threshold is chosen for

WHAT_IT_SHOWS = (
    "The images judged were never seen in training, but their classes were: this shows that training, search and "
    "verification work together on real images, and what a learnt metric gains over raw pixels as a verifier. "
    "Digits are easy to search: raw pixels alone find a neighbour of the right class 99 times in 100. It does not "
    "show how well classes are told apart that were never trained on; that is what held-out alphabets of Omniglot "
    "measure."
)

NEXT_COMMANDS = (
    "vitembed train PHOTOS --out runs/photos                 # PHOTOS/CLASS/IMAGE",
    "vitembed evaluate runs/photos PHOTOS --held-out         # on the classes that training held out",
    "vitembed index create photos.index --model runs/photos && vitembed index sync photos.index PHOTOS",
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Digits:
    """The demo's images: arrays (N, 8, 8) uint8, bright on black, and labels (N,) from 0 to 9."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @classmethod
    def load(cls) -> "Digits":
        """Read them from scikit-learn; the file's 17 grey levels are spread over 0..255."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return cls(np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.int64))

    def __getitem__(self, part: slice) -> "Digits":
        return Digits(self.images[part], self.labels[part])


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured and made.

    Attributes:
        reports: of "raw pixels", "untrained" and "trained", on the 597 images never seen.
        verifier: its threshold was chosen on images of the first 1,200.
        far: the false-accept rate of that threshold on the images never seen.
        frr: the false-reject rate likewise.
        match: the decision on two images of one digit.
        no_match: the decision on images of two digits.
        folder: where the model, the index, the images and report.html are.
        seconds: how long it took.
    """

    reports: dict[str, EvaluationReport]
    verifier: Verifier
    far: float
    frr: float
    match: Decision
    no_match: Decision
    folder: Path
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON types."""
        trained = self.reports["trained"].to_dict()
        return {
            **trained,
            "raw pixels": self.reports["raw pixels"].to_dict(),
            "untrained": self.reports["untrained"].to_dict(),
            "threshold": self.verifier.threshold,
            "far wanted": FAR,
            "far measured": self.far,
            "frr measured": self.frr,
            "report": str(self.folder / "report.html"),
            "seconds": round(self.seconds, 1),
        }


def run_demo(folder: Path, *, seed: int = 0, epochs: int = 40, say: Say = print, progress: bool = True) -> DemoResult:
    """Train, measure, index, search, verify; write everything below a folder.

    Args:
        folder: is made; a model or index that an earlier run left there is replaced.
        seed: of weights and batches.
        epochs: of training; 40 take about a minute on two cores.
        say: is told what happens, a line at a time.
        progress: show progress bars on standard error.

    Raises:
        VitembedError: if the folder cannot be written.
    """
    started = time.perf_counter()
    digits = Digits.load()
    known, unseen = digits[:TRAINED], digits[TRAINED:]
    say(f"{len(known.labels)} handwritten digits to train on, {len(unseen.labels)} that the network never sees")
    gallery = write_images(unseen[:-QUERIES], folder / "gallery")
    queries = write_images(unseen[-QUERIES:], folder / "queries")
    files = gallery + queries

    model = new_model(seed)
    untrained = model.encode(list(unseen.images))
    result = train_model(model, known, folder / "model", seed=seed, epochs=epochs, progress=progress)
    vectors = model.encode(files)
    raw = unseen.images.reshape(len(unseen.images), -1)
    reports = {
        "raw pixels": evaluate_embeddings(raw, unseen.labels),
        "untrained": evaluate_embeddings(untrained, unseen.labels),
        "trained": evaluate_embeddings(vectors, unseen.labels),
    }
    for name, report in reports.items():
        say(describe(name, report))

    choosing = known[-CHOOSING:]
    pairs = Pairs.from_labels(list(choosing.images), choosing.labels)
    verifier = Verifier.fit(model, pairs, FAR, location=str((folder / "model").absolute()))
    verifier.save(folder / "digits.verifier")
    scores, is_match = pair_scores(vectors, unseen.labels)
    accepted = verifier.decide(scores)
    far, frr = float(accepted[~is_match].mean()), float((~accepted[is_match]).mean())
    say(f"threshold {verifier.threshold:.3f} for a wanted false-accept rate of {FAR:.0%}: {far:.2%} on unseen images,")
    say(f"with {frr:.2%} of the matching pairs rejected")

    hits = search(model, folder, queries, progress=progress)
    say(f"{len(gallery)} of the unseen images are indexed, the other {len(queries)} searched for among them")
    same, other = example_pairs(unseen.labels)
    match, no_match = (verifier.compare(files[a], files[b]) for a, b in (same, other))
    for (a, b), decision in ((same, match), (other, no_match)):
        say(f"{short(files[a])} and {short(files[b])}: {describe_decision(decision)}")

    seconds = time.perf_counter() - started
    outcome = DemoResult(reports, verifier, far, frr, match, no_match, folder, seconds)
    page = Page("vitembed demo: handwritten digits")
    add_figures(page, outcome, result, scores, is_match)
    add_pictures(page, outcome, model, queries, hits, [(files[a], files[b]) for a, b in (same, other)])
    page.write(folder / "report.html")
    atomic_write(folder / "figures.json", json.dumps(outcome.to_dict(), indent=1) + "\n")
    return outcome


def new_model(seed: int) -> Embedder:
    """Return the demo's untrained network: 16 x 16 pixels, patches of 4, a convolutional stem, four small blocks."""
    preprocess = Preprocess.grey((16, 16), resize="squash", invert=False)
    return Embedder.create("N/4", preprocess=preprocess, stem="conv", pooling="mean", seed=seed)


def train_model(model: Embedder, known: Digits, out: Path, *, seed: int, epochs: int, progress: bool) -> TrainResult:
    """Train on the known digits but for the last ones, which choose the best epoch."""
    is_validation = np.arange(len(known.labels)) >= len(known.labels) - CHOOSING
    dataset = ImageDataset.from_arrays(list(known.images), known.labels, is_validation=is_validation)
    config = TrainConfig(
        epochs=epochs, classes_per_batch=10, images_per_class=16, augment=Augment.named("ink"), seed=seed
    )
    loss = TripletLoss(margin=0.5, mining="all")
    return train(model, dataset, loss=loss, config=config, out=out, overwrite=True, progress=progress)


def write_images(digits: Digits, folder: Path) -> list[Path]:
    """Write each image as a PNG below a folder of its digit; return the paths in order."""
    paths = []
    for number, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        path = folder / str(label) / f"{number:03}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VitembedError(f"cannot create the folder {path.parent}: {error.strerror}") from error
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        atomic_write(path, buffer.getvalue())
        paths.append(path)
    return paths


def search(model: Embedder, folder: Path, queries: list[Path], *, progress: bool) -> list[list[Hit]]:
    """Index the gallery's files, and search for the queries."""
    place = folder / "digits.index"
    if place.exists():
        shutil.rmtree(place)
    location = str((folder / "model").absolute())
    with Index.create(place, model.dim, model.fingerprint, location=location) as index:
        sync(index, model, folder / "gallery", progress=progress)
        return index.search(model.encode(queries), k=NEIGHBOURS)


def example_pairs(labels: NDArray[np.int64]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the positions of two images of one digit, and of images of two digits that are easily confused."""
    threes, fives = np.flatnonzero(labels == 3), np.flatnonzero(labels == 5)
    return (int(threes[0]), int(threes[1])), (int(threes[0]), int(fives[0]))


def add_figures(
    page: Page, outcome: DemoResult, result: TrainResult, scores: NDArray[np.floating[Any]], is_match: NDArray[np.bool_]
) -> None:
    """Write the first part of the report: what was measured."""
    page.paragraph(
        f"A small hybrid Vision Transformer, trained with triplet loss on the first {TRAINED:,} of scikit-learn's "
        f"handwritten digits and judged on the {judged(outcome)} that follow, in {outcome.seconds:.0f} seconds."
    )
    page.heading("How good it is, on images never seen")
    rows = []
    for name, report in outcome.reports.items():
        verification, retrieval = report.verification, retrieval_of(report)
        rows.append(
            [
                name,
                f"{verification.eer:.2%}",
                interval(verification.eer_interval),
                f"{retrieval.recall_at_1:.2%}",
                interval(retrieval.recall_at_1_interval),
                f"{retrieval.map_at_r:.3f}",
            ]
        )
    page.table(["compared by", "equal error rate", "95 %", "recall@1", "95 %", "MAP@R"], rows)
    page.paragraph(WHAT_IT_SHOWS, faint=True)
    page.paragraph(
        "Equal error rate: over all pairs of images, at the threshold where as many matching pairs are rejected as "
        "non-matching ones accepted. Recall@1: how often the nearest other image is of the same digit. Intervals: "
        "bootstrap over the ten digits.",
        faint=True,
    )
    page.heading("Training")
    best = f"the dotted line is the best epoch on {CHOOSING} of the {TRAINED:,} images, {result.best_epoch}"
    page.figure(plots.plot_history(result.history, result.best_epoch), f"Loss, shares and distances by epoch; {best}.")
    page.heading("Verification")
    page.figure(
        plots.plot_score_histogram(scores, is_match, outcome.verifier.threshold),
        "Scores of all pairs of unseen images, and the threshold.",
    )
    page.paragraph(
        f"The threshold was chosen for a false-accept rate of {FAR:.0%} on {CHOOSING} of the first {TRAINED:,} images. "
        f"On images never seen it accepts {outcome.far:.2%} of the non-matching pairs and rejects {outcome.frr:.2%} "
        "of the matching ones. A threshold from so few images is uncertain: over the digits, the 95 % interval of its "
        f"false-accept rate was {interval(outcome.verifier.calibration.far_interval)}."
    )


def add_pictures(
    page: Page,
    outcome: DemoResult,
    model: Embedder,
    queries: list[Path],
    hits: list[list[Hit]],
    pairs: list[tuple[Path, Path]],
) -> None:
    """Write the second part of the report: pairs, searches and attention as pictures, and what to type next."""
    for paths, decision in zip(pairs, (outcome.match, outcome.no_match), strict=True):
        page.tiles([Tile(load_image(path), short(path)) for path in paths])
        page.paragraph(describe_decision(decision))
    page.heading("Search")
    # Queries with a wrong neighbour first: they are what there is to learn from.
    wrong = [any(not is_right(query, hit) for hit in found) for query, found in zip(queries, hits, strict=True)]
    order = sorted(range(len(queries)), key=lambda at: not wrong[at])[:SHOWN]
    page.sheet(
        [
            [Tile(load_image(queries[at]), f"query {queries[at].parent.name}")]
            + [
                Tile(load_image(hit.metadata["path"]), hit.id, hit.score, is_right(queries[at], hit))
                for hit in hits[at]
            ]
            for at in order
        ]
    )
    page.paragraph(
        f"{sum(wrong)} of the {len(queries)} queries have a wrong digit among their {NEIGHBOURS} neighbours; these are "
        "shown first.",
        faint=True,
    )
    page.heading("What it looks at")
    shown = queries[:SHOWN]
    maps = attention_maps(model, shown)
    page.tiles(
        [Tile(plots.overlay(load_image(path), heat), path.parent.name) for path, heat in zip(shown, maps, strict=True)]
    )
    page.paragraph(
        "Attention rollout (Abnar and Zuidema 2020): how much each patch counts for the embedding.", faint=True
    )
    page.heading("Next, with your own pictures")
    page.code("\n".join(NEXT_COMMANDS))


def is_right(query: Path, hit: Hit) -> bool:
    """Tell whether a hit is of the query's digit: the name of its folder."""
    return hit.id.split("/")[0] == query.parent.name


def short(path: Path) -> str:
    """Return the folder and the name of an image: its digit and its number."""
    return f"{path.parent.name}/{path.name}"


def judged(outcome: DemoResult) -> int:
    """Return how many images were judged."""
    return retrieval_of(outcome.reports["trained"]).images


def retrieval_of(report: EvaluationReport) -> RetrievalReport:
    """Return the search's part of a report, which one on labelled images has."""
    assert report.retrieval is not None
    return report.retrieval


def interval(bounds: tuple[float, float] | None) -> str:
    """Return an interval of rates as text."""
    return "" if bounds is None else f"{bounds[0]:.2%} to {bounds[1]:.2%}"


def describe(name: str, report: EvaluationReport) -> str:
    """Return one line: equal error rate and recall@1 of one way to compare the images."""
    return (
        f"{name + ':':<12} equal error rate {report.verification.eer:6.2%}   "
        f"recall@1 {retrieval_of(report).recall_at_1:6.2%}"
    )


def describe_decision(decision: Decision) -> str:
    """Return one line: the decision, its probability and its score."""
    word = "match" if decision.match else "no match"
    return f"{word}, probability {decision.probability:.3f} (score {decision.score:.3f})"
