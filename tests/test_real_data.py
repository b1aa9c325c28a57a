"""On real photographs and drawings, where VITEMBED_DATA names the folder that holds them."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vitembed.embedder import Embedder
from vitembed.evaluate import evaluate_embeddings
from vitembed.images import load_image
from vitembed.index import Index, sync
from vitembed.preprocess import Preprocess
from vitembed.training import Augment, ImageDataset, TrainConfig, TripletLoss, train

DATA = Path(os.environ.get("VITEMBED_DATA", "missing"))
ALPHABETS = ("Balinese", "Early_Aramaic", "Greek", "Korean")

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="VITEMBED_DATA names no folder")


def extract(name: str, folder: Path, keep: tuple[str, ...]) -> Path:
    with zipfile.ZipFile(DATA / f"{name}.zip") as archive:
        archive.extractall(folder, [member for member in archive.namelist() if member.startswith(keep)])
    return folder


def test_letters_never_seen_are_told_apart_after_seconds_of_training(tmp_path: Path) -> None:
    dataset = ImageDataset.load(extract("omniglot_background", tmp_path / "letters", ALPHABETS))
    unseen = np.array([name.startswith("Korean") for name in dataset.classes])[dataset.labels]
    known, held = dataset.subset(~unseen), dataset.subset(unseen)
    reading = Preprocess.grey((32, 32), scan=True)
    model = Embedder.create("N/8", preprocess=reading, stem="conv", pooling="mean", device="cpu")
    before = evaluate_embeddings(model.encode(held.images), held.labels)
    config = TrainConfig(
        epochs=2, classes_per_batch=24, images_per_class=4, augment=Augment.named("ink"), validation="none", workers=2
    )
    train(model, known, loss=TripletLoss(0.2, "all"), config=config)
    after = evaluate_embeddings(model.encode(held.images), held.labels)
    assert len(held.classes) == 40
    assert after.retrieval.recall_at_1 > before.retrieval.recall_at_1 + 0.1
    assert after.verification.eer < before.verification.eer - 0.05


def test_photographs_are_indexed_found_and_followed(tmp_path: Path) -> None:
    folder = extract("objects", tmp_path / "objects", ("ceiling_fan/image_000", "sunflower/image_000"))
    photos = sorted(folder.rglob("*.jpg"))
    assert len(photos) >= 9
    model = Embedder.create("N/8", preprocess=Preprocess((64, 64)), stem="conv", device="cpu")
    broken = photos[0].with_name("broken.jpg")
    broken.write_bytes(photos[0].read_bytes()[:2000])
    with Index.create(tmp_path / "index", model.dim, model.fingerprint) as index:
        report = sync(index, model, folder, batch_size=4)
        assert report.added == len(photos)
        [reason] = report.failed.values()
        assert "truncated" in reason
        for photo in photos:
            [[hit]] = index.search(model.encode([photo]), k=1)
            assert hit.id == photo.relative_to(folder).as_posix()
            assert hit.score == pytest.approx(1, abs=1e-5)
            assert load_image(photo).mode in ("RGB", "L")
        photos[1].unlink()
        assert sync(index, model, folder).removed == 1
