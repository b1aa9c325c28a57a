"""The recipe for signatures keeps forgeries from being positives, follows its protocols, and prints what is so."""

import contextlib
import io
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from recipes import signatures
from vitembed.architecture import ViTConfig
from vitembed.embedder import Embedder
from vitembed.preprocess import Preprocess
from vitembed.training import ImageDataset, TripletLoss
from vitembed.verify import Verifier

GENUINE, FORGED = 7, 3  # images of a writer: 21 pairs of either kind, so that none is drawn by chance
WRITERS = ("2", "3", "4", "8", "9", "10", "11", "12")
MADE_UP = 4
HELD_OUT, CALIBRATING = ["10", "11", "12"], 3
TINY = ViTConfig((8, 16), 4, 1, width=16, depth=1, heads=1, stem=((16, 4),))

Place = Callable[[Path, str, bool, int], Path]


def in_folders(root: Path, writer: str, is_forged: bool, number: int) -> Path:
    return root / writer / ("forged" if is_forged else "genuine") / f"{number}.png"


def as_cedar(root: Path, writer: str, is_forged: bool, number: int) -> Path:
    return (
        root
        / ("full_forg" if is_forged else "full_org")
        / f"{'forgeries' if is_forged else 'original'}_{writer}_{number}.png"
    )


def scribble(root: Path, place: Place) -> Path:
    """Write signatures: a zigzag for each writer, shaken a little for genuine images and more for forgeries."""
    rng = np.random.default_rng(0)
    for writer in WRITERS:
        stroke = rng.uniform(4, 28, (6, 2)) * (2, 1)
        for is_forged in (False, True):
            for number in range(1, 1 + (FORGED if is_forged else GENUINE)):
                image = Image.new("L", (64, 32), 245)
                shaken = stroke + rng.normal(0, 3 if is_forged else 1, stroke.shape)
                ImageDraw.Draw(image).line([tuple(point) for point in shaken], fill=20, width=2)
                path = place(root, writer, is_forged, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    return root


@dataclass
class Ran:
    """One run of the recipe: what it was given and printed, and the batches of each training, of both kinds."""

    data: Path
    out: Path
    printed: str
    begun: list[tuple[ImageDataset, list[list[int]]]]
    trained: list[tuple[ImageDataset, list[list[int]]]]

    @property
    def results(self) -> Any:
        return json.loads((self.out / "results.json").read_text())


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make everything that takes time small."""
    monkeypatch.setattr(signatures, "INK", Preprocess.grey((8, 16), scan=True, binarize=True))
    monkeypatch.setattr(signatures, "NETWORK", partial(Embedder.create, TINY, pooling="mean", device="cpu"))
    monkeypatch.setattr(signatures, "SETTINGS", replace(signatures.SETTINGS, classes_per_batch=2, images_per_class=3))
    monkeypatch.setattr(signatures, "PUZZLES", replace(signatures.PUZZLES, tile=1, batch_size=16))
    monkeypatch.setattr(signatures, "GENERATED", MADE_UP)
    monkeypatch.setattr(signatures, "PRETRAINING", replace(signatures.PRETRAINING, epochs=1, classes_per_batch=2))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr(signatures, "write_evaluation_page", lambda *_, **__: None)  # which takes longest


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["signatures.py", *map(str, arguments)])
    signatures.main()


@pytest.fixture(scope="module", params=[in_folders, as_cedar])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run the recipe on two seeds, and look over the shoulder of its trainings."""
    trained: list[tuple[ImageDataset, list[list[int]]]] = []

    class Watched(TripletLoss):
        def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
            trained[-1][1].append(labels.tolist())
            return super().forward(embeddings, labels, *others, **more)

    def train(model: Embedder, dataset: ImageDataset, **settings: Any) -> object:
        trained.append((dataset, []))
        return original(model, dataset, **settings)

    original = signatures.train
    folder = tmp_path_factory.mktemp("signatures")
    data, out = scribble(folder / "data", request.param), folder / "out"
    choice = ("--held-out", *HELD_OUT, "--calibrate", CALIBRATING, "--epochs", 1, "--seeds", 2)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        make_small(patch)
        patch.setattr(signatures, "train", train)
        patch.setattr(signatures, "LOSS", partial(Watched, 0.2, "semihard"))
        call(patch, "--data", data, "--out", out, *choice)
    return Ran(data, out, printed.getvalue(), trained[::2], trained[1::2])


def shows(path: Path) -> tuple[str, bool]:
    """Return the writer whom an image shows or imitates, and whether it is a forgery, from its name alone."""
    if named := re.fullmatch(r"(original|forgeries)_(\d+)_\d+", path.stem):
        return named[2], named[1] == "forgeries"
    return path.parts[-3], path.parts[-2] == "forged"


def plain_error_rate(matching: list[float], others: list[float]) -> float:
    """Return where the shares of accepted others and of rejected matches meet, one threshold after the other."""
    far, frr = 0.0, 1.0
    for threshold in sorted({*matching, *others}, reverse=True):
        next_far = sum(score >= threshold for score in others) / len(others)
        next_frr = sum(score < threshold for score in matching) / len(matching)
        if next_far >= next_frr:
            share = (frr - far) / ((frr - far) + (next_far - next_frr))
            return far + share * (next_far - far)
        far, frr = next_far, next_frr
    raise AssertionError("the rates never met")


def printed_figures(printed: str, name: str) -> tuple[float, list[float]]:
    """Return mean and values by seed of the last time a figure was printed."""
    *_, last = re.findall(rf"^{re.escape(name)}\n    mean: (\S+)\n(?:    .*\n)*?    by seed: \[(.*)\]$", printed, re.M)
    return float(last[0]), [float(value) for value in last[1].split(", ")]


def test_forgeries_are_trained_on_and_never_positives_and_writers_are_kept_apart(ran: Ran) -> None:
    assert len(ran.trained) == 2
    calibrated = set()
    for dataset, batches in ran.trained:
        facts = [shows(Path(str(image))) for image in dataset.images]
        writers = {writer for writer, _ in facts}
        assert not writers & set(HELD_OUT)
        assert len(writers) == len(WRITERS) - len(HELD_OUT) - CALIBRATING
        calibrated.add(frozenset(set(WRITERS) - writers - set(HELD_OUT)))
        assert len(facts) == len(writers) * (GENUINE + FORGED)
        forged = {int(label) for label, (_, is_forged) in zip(dataset.labels, facts, strict=True) if is_forged}
        assert forged.isdisjoint(int(label) for label, (_, fake) in zip(dataset.labels, facts, strict=True) if not fake)
        assert len(forged) == len(writers) * FORGED
        assert forged <= set(itertools.chain(*batches))
        for batch in batches:
            assert all(batch.count(label) == 1 for label in forged.intersection(batch))
    assert len(calibrated) == 2  # drawn anew for each seed


def test_each_seed_begins_with_generated_writers_of_its_own_whose_forgeries_are_never_positives(ran: Ran) -> None:
    drawn = []
    for seed, (dataset, batches) in enumerate(ran.begun):
        assert dataset.forgery_of is not None
        assert len(dataset.identities) == MADE_UP
        forged = set(dataset.labels[dataset.forgery_of >= 0].tolist())
        assert forged.intersection(*map(set, batches[:1]))
        for batch in batches:
            assert all(batch.count(label) == 1 for label in forged.intersection(batch))
        drawn.append(np.asarray(dataset.images[0]).tobytes())
        began = Embedder.from_pretrained(ran.out / f"seed-{seed}-generated", device="cpu").network.state_dict()
        ended = Embedder.from_pretrained(ran.out / f"seed-{seed}", device="cpu").network.state_dict()
        assert any(not torch.equal(began[name], ended[name]) for name in began)
    assert len(set(drawn)) == len(ran.begun) == 2


def test_generated_signatures_are_learned_once_and_not_at_all_where_something_else_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    trained: list[int] = []

    def train(model: Embedder, dataset: ImageDataset, **settings: Any) -> object:
        trained.append(len(dataset.identities))
        return original(model, dataset, **settings)

    original = signatures.train
    monkeypatch.setattr(signatures, "train", train)
    data, out = scribble(tmp_path / "data", in_folders), tmp_path / "out"
    shared = ("--data", data, "--held-out", *HELD_OUT, "--calibrate", 0, "--epochs", 1, "--seeds", 1)
    real = len(WRITERS) - len(HELD_OUT)
    call(monkeypatch, *shared, "--out", out)
    assert trained == [MADE_UP, real]
    begun = (out / "seed-0-generated" / "history.json").read_bytes()  # with seconds of each epoch
    shutil.rmtree(out / "seed-0")  # such as by somebody who tries other settings
    call(monkeypatch, *shared, "--out", out)
    assert (out / "seed-0-generated" / "history.json").read_bytes() == begun
    trained.clear()
    call(monkeypatch, *shared, "--out", tmp_path / "none", "--generated", 0)
    call(monkeypatch, *shared, "--out", tmp_path / "init", "--init", out / "seed-0-generated")
    assert trained == [real, real]
    assert not any((tmp_path / name / "seed-0-generated").exists() for name in ("none", "init"))


def test_the_protocols_are_counted_and_printed_rates_are_those_of_a_plain_loop(ran: Ran) -> None:
    held_out = sorted(path for path in ran.data.rglob("*.png") if shows(path)[0] in HELD_OUT)
    pooled, means = [], []
    for seed, report in enumerate(ran.results["reports"]):
        vectors = Embedder.from_pretrained(ran.out / f"seed-{seed}", device="cpu").encode(held_out).astype(np.float64)
        of_writers = []
        for writer in HELD_OUT:
            own = [row for row, path in zip(vectors, held_out, strict=True) if shows(path) == (writer, False)]
            fake = [row for row, path in zip(vectors, held_out, strict=True) if shows(path) == (writer, True)]
            matching = [float(a @ b) for a, b in itertools.combinations(own, 2)]
            skilled = [float(a @ b) for a, b in itertools.product(own, fake)]
            assert len(matching) == len(skilled) == 21
            of_writers.append((matching, skilled))
        pooled.append(plain_error_rate(*(list(itertools.chain(*side)) for side in zip(*of_writers, strict=True))))
        means.append(float(np.mean([plain_error_rate(*sides) for sides in of_writers])))
        for kind in ("skilled", "random"):
            assert (report[kind]["matches"], report[kind]["non_matches"]) == (63, 63)
        assert report["references"]["count"] == 6
        assert report["references"]["enrolled"] == len(HELD_OUT)
        assert report["references"]["rules"]["mean"]["skilled"]["non_matches"] == len(HELD_OUT) * FORGED
    for name, values in (("EER, pairs, skilled", pooled), ("EER, pairs, skilled, mean of writers", means)):
        mean, by_seed = printed_figures(ran.printed, name)
        assert by_seed == pytest.approx(values, abs=6e-5)
        assert mean == pytest.approx(np.mean(values), abs=6e-5)
        row = ran.results["figures"][name]
        assert (row["mean"], row["by seed"]) == (mean, by_seed)
        assert row["standard deviation over seeds"] == pytest.approx(np.std(values, ddof=1), abs=6e-5)
        assert row["95 % over writers"] is None  # of three writers nobody knows


def test_each_seed_leaves_a_model_a_verifier_for_it_and_a_page_with_det_curves(ran: Ran) -> None:
    for seed in range(2):
        folder = ran.out / f"seed-{seed}"
        model = Embedder.from_pretrained(folder, device="cpu")
        assert Verifier.load(folder / "verifier.json", model).calibration.identities == CALIBRATING
        page = (folder / "report.html").read_text()
        assert re.search(r'<img[^>]*src="data:image/png;base64,[^>]*>[^<]*<figcaption>Detection error trade-off', page)
    assert "FAR of the verifier, skilled" in ran.results["figures"]


def test_the_control_is_printed_and_kept(ran: Ran) -> None:
    control = ran.results["control"]
    assert 0 <= control <= 0.5
    assert f"one image at a time: {control:.4f}\n" in ran.printed


def test_the_control_tells_darker_forgeries_and_the_network_does_not_see_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    drawn: dict[tuple[str, int], list[NDArray[np.uint8]]] = {}
    for writer, is_forged, number in itertools.product("12", (False, True), range(12)):
        points = [tuple(point) for point in rng.uniform(8, 56, (6, 2)) * (2, 1)]
        for name, darkness in (("darker", 60), ("alike", 130)):  # of the forgeries' first strokes
            image = Image.new("L", (128, 64), 250)
            ImageDraw.Draw(image).line(points, fill=darkness if is_forged else 130, width=3)
            ImageDraw.Draw(image).line(points[:4], fill=140 + int(rng.integers(8)), width=3)
            path = in_folders(tmp_path / name, writer, is_forged, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            if is_forged:
                drawn.setdefault((writer, number), []).append(signatures.INK(image))
    sets = [ImageDataset.from_signatures(tmp_path / name) for name in ("darker", "alike")]
    darker, alike = map(signatures.darkness_eer, sets)
    assert darker is not None
    assert alike is not None
    assert darker < 0.1
    assert 0.25 < alike <= 0.5
    for by_darkness in drawn.values():
        np.testing.assert_array_equal(*by_darkness)
    levels, stroke = [60, 130], np.tri(200, k=3) > np.tri(200, k=-4)
    pages = [Image.fromarray(np.where(stroke, np.uint8(level), np.uint8(250))) for level in levels]
    grey = signatures.start(None, 0, grey=True).preprocess
    assert int(grey(pages[0]).max()) > int(grey(pages[1]).max()) + 20


def test_without_forgeries_there_is_no_control(tmp_path: Path) -> None:
    data = ImageDataset.from_signatures(scribble(tmp_path, in_folders))
    genuine = ImageDataset.from_arrays(list(data.images), [data.classes[label] for label in data.labels])
    assert signatures.darkness_eer(genuine) is None


def test_a_square_model_of_other_images_goes_on_with_puzzles_at_the_size_of_signatures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    square = Preprocess.grey((16, 16))
    known = Embedder.create(replace(TINY, image_size=(16, 16)), preprocess=square, seed=5, device="cpu")
    known.save_pretrained(tmp_path / "letters")
    begun = signatures.start(str(tmp_path / "letters"), 0)
    assert begun.preprocess == signatures.INK
    assert torch.equal(begun.network.vit.blocks[0].attn.qkv.weight, known.network.vit.blocks[0].attn.qkv.weight)
    data, out = scribble(tmp_path / "data", in_folders), tmp_path / "out"
    start = ("--init", tmp_path / "letters", "--jigsaw", 1)
    choice = ("--held-out", *HELD_OUT, "--calibrate", 0)
    call(monkeypatch, "--data", data, "--out", out, *start, *choice, "--epochs", 1, "--seeds", 1)
    model = Embedder.from_pretrained(out / "seed-0", device="cpu")
    assert model.preprocess.size == (8, 16)
    assert not (out / "seed-0" / "verifier.json").exists()


def test_the_last_writers_are_held_out_by_default_and_colours_of_the_start_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    photos = Embedder.create(replace(TINY, channels=3), preprocess=Preprocess((8, 16)), device="cpu")
    photos.save_pretrained(tmp_path / "photos")
    monkeypatch.setattr(signatures, "FEW", 3)
    data, out = scribble(tmp_path / "data", as_cedar), tmp_path / "out"
    start = ("--init", tmp_path / "photos", "--calibrate", 0)
    call(monkeypatch, "--data", data, "--out", out, *start, "--epochs", 1, "--seeds", 1)
    assert json.loads((out / "results.json").read_text())["held_out"] == ["10", "11", "12"]
    preprocess = Embedder.from_pretrained(out / "seed-0", device="cpu").preprocess
    assert (preprocess.channels, preprocess.mean, preprocess.scan) == (3, photos.preprocess.mean, True)


def test_an_interrupted_run_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small: None
) -> None:
    def train(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(signatures, "train", train)
    data = scribble(tmp_path / "data", in_folders)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--data", data, "--out", tmp_path / "out", "--held-out", *HELD_OUT, "--calibrate", 0)
    assert ended.value.code == 130
    assert re.fullmatch(r"signatures\.py: interrupted; [^\n]*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--held-out", "13"), "unknown writer '13'; did you mean"),
        (("--held-out", "10", "--calibrate", "0"), "no writer has two genuine images and another writer beside"),
        (("--held-out", *HELD_OUT, "--calibrate", "4"), "5 writers are not held out; 4 to calibrate must leave 2"),
        (("--held-out", *HELD_OUT, "--epochs", "0", "--calibrate", "0"), "epochs must be at least 1"),
        (("--held-out", *HELD_OUT, "--generated", "-1", "--calibrate", "0"), "two writers of two images .* got -1"),
        (("--held-out", *HELD_OUT, "--init", "nowhere", "--calibrate", "0"), "nowhere"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small: None,
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    data = scribble(tmp_path / "data", in_folders)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--data", data, "--out", tmp_path / "out", *arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"signatures\.py: error: [^\n]*(?:{complaint})[^\n]*\n", error)
    assert not (tmp_path / "out").exists()
