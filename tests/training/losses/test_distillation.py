"""Distillation against a plain computation, its gradient, what teachers are asked, what it refuses, and in training."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training.stripes import stripes
from vitembed.embedder import Embedder
from vitembed.errors import CheckpointError, ConfigError, VectorError
from vitembed.preprocess import Preprocess
from vitembed.training import Augment, CrossBatchMemory, DistillationLoss, TrainConfig, TripletLoss, build_loss, train
from vitembed.training.costs import measure_step
from vitembed.training.losses.distillation import build_distillation
from vitembed.training.plan import plan_training
from vitembed.vit import ViTConfig

QUICK = TrainConfig(epochs=12, classes_per_batch=4, images_per_class=4, learning_rate=3e-3, workers=0)


def embedder(seed: int = 0, *, size: int = 8, width: int = 16, **options: Any) -> Embedder:
    config = ViTConfig((size, size), 4, 1, width=width, depth=1, heads=2)
    preprocess = Preprocess.grey((size, size), resize="squash", invert=False)
    return Embedder.create(config, preprocess=replace(preprocess, **options), seed=seed, device="cpu")


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divergence(own: Tensor, theirs: Tensor, temperature: float) -> float:
    """Return the loss by its definition, an image and a neighbour at a time."""
    total = 0.0
    count = len(own)
    for image in range(count):
        others = [other for other in range(count) if other != image]

        def shares(vectors: Tensor, image: int = image, others: list[int] = others) -> list[float]:
            unit = (vectors / vectors.norm(dim=1, keepdim=True)).numpy()
            terms = [float(np.exp(unit[image] @ unit[other] / temperature)) for other in others]
            return [term / sum(terms) for term in terms]

        total += sum(p * np.log(p / q) for p, q in zip(shares(theirs), shares(own), strict=True))
    return total / count


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_the_value_is_that_of_the_definition(count: int, temperature: float) -> None:
    own, theirs = rows(count, 6), rows(count, 4, seed=1)
    loss = DistillationLoss([embedder()], temperature=temperature)
    value = loss(own, torch.zeros(count), taught=theirs)
    assert value.item() == pytest.approx(divergence(own, theirs, temperature), rel=1e-9, abs=1e-12)
    assert (value > 1e-3) == (count > 2)  # of two images each has one neighbour
    assert loss(theirs * 3, torch.zeros(count), taught=theirs).item() == pytest.approx(0, abs=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    loss, theirs = DistillationLoss([embedder()], temperature=0.3), rows(5, 4, seed=1)
    leaf = rows(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda own: loss(own, torch.zeros(5), taught=theirs), leaf)


def test_the_loss_is_taken_in_float32_whatever_the_precision() -> None:
    loss = DistillationLoss([embedder()])
    own, theirs = rows(6, 8).float(), rows(6, 8, seed=1).float()
    expected = loss(own, torch.zeros(6), taught=theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(own, torch.zeros(6), taught=theirs), expected)
    assert expected.dtype == torch.float32


def test_inner_products_of_what_is_taught_are_the_mean_cosines() -> None:
    teachers = [embedder(1), embedder(2, width=32)]
    pixels = torch.from_numpy(np.stack([teachers[0].preprocess(image) for image in stripes().images[:5]]))
    taught = DistillationLoss(teachers).teach(pixels)
    assert taught.shape == (5, 48)
    assert not taught.requires_grad
    vectors = [torch.from_numpy(teacher.embed_pixels(pixels)) for teacher in teachers]
    torch.testing.assert_close(taught @ taught.T, sum(one @ one.T for one in vectors) / 2)  # type: ignore[operator]


def test_a_teacher_of_another_size_sees_the_images_resampled() -> None:
    small = embedder(1, size=8)
    train(small, stripes(), config=replace(QUICK, validation="none"))  # one untrained finds all images alike
    large = torch.from_numpy(np.stack([embedder(size=16).preprocess(image) for image in stripes().images]))
    taught = DistillationLoss([small]).teach(large).numpy()
    vectors = small.encode(stripes().images, workers=0)
    places = np.triu_indices(len(vectors), 1)
    assert np.corrcoef((taught @ taught.T)[places], (vectors @ vectors.T)[places])[0, 1] > 0.95


def test_a_model_can_be_its_own_teacher_and_the_teacher_stays_as_it_was() -> None:
    model = embedder()
    before = copy.deepcopy(model.network.state_dict())
    loss = DistillationLoss([model])
    train(model, stripes(), loss=loss, config=replace(QUICK, epochs=1, augment=Augment.named("ink")))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in loss._networks[0].state_dict().items())
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}


def cosines(model: Embedder) -> Any:
    vectors = model.encode(stripes(seed=5).images, workers=0)
    return (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_student_comes_to_find_alike_what_its_teachers_do(chunk: int | None) -> None:
    teachers = [embedder(seed) for seed in (1, 2)]
    for seed, teacher in enumerate(teachers):
        train(teacher, stripes(), loss=TripletLoss(), config=replace(QUICK, seed=seed, validation="none"))
    student = embedder(3)
    theirs = np.mean([cosines(teacher) for teacher in teachers], axis=0)
    before = np.corrcoef(cosines(student), theirs)[0, 1]
    shuffled = replace(stripes(), labels=np.random.default_rng(0).permutation(stripes().labels))  # labels say nothing
    config = replace(QUICK, epochs=30, validation="none", gradient_cache=chunk)
    result = train(student, shuffled, loss=DistillationLoss(teachers), config=config)
    assert result.history[-1]["loss"] < 0.3 * result.history[0]["loss"]
    assert np.corrcoef(cosines(student), theirs)[0, 1] > max(0.9, before + 0.2)
    assert result.diagnoses == []


def test_a_student_has_seen_what_its_teachers_have(tmp_path: Path) -> None:
    teacher, student = embedder(1), embedder(2)
    train(teacher, stripes(), config=replace(QUICK, epochs=1))
    held_out = teacher.provenance["held-out classes"]
    config = replace(QUICK, epochs=1, seed=7)
    train(student, stripes(), loss=DistillationLoss([teacher]), config=config, out=tmp_path / "student")
    assert student.provenance["held-out classes"] == held_out  # held out again, in place of others drawn by the seed
    fewer = stripes().with_classes(["way 0", "way 1", *held_out])
    other = embedder(3)
    train(other, fewer, loss=DistillationLoss([teacher]), config=replace(config, validation="none"))
    assert set(other.provenance["trained classes"]) == {f"way {number}" for number in range(8)}
    assert teacher.fingerprint in other.provenance["loss"]
    with pytest.raises(CheckpointError, match="holds a training with loss"):
        train(
            embedder(2),
            stripes(),
            loss=DistillationLoss([embedder(9)]),
            config=config,
            out=tmp_path / "student",
            resume=True,
        )


def test_a_plan_counts_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = embedder(1)
    loss, asked = DistillationLoss([teacher]), []
    monkeypatch.setattr(loss, "teach", lambda pixels: asked.append(len(pixels)))
    measure_step(embedder().network, loss, None, torch.arange(16) // 4, QUICK, "fp32")
    assert asked
    own = sum(4 * one.numel() for one in [*teacher.network.parameters(), *teacher.network.buffers()])
    with_one, with_two, without = (
        plan_training(embedder(), stripes(), loss=one, config=QUICK).memory.weights
        for one in (DistillationLoss([teacher]), DistillationLoss([teacher] * 2), TripletLoss())
    )
    assert (with_one - without, with_two - with_one) == (own, own)


@pytest.mark.parametrize("chunk", [None, 5])
def test_teachers_are_asked_of_the_very_pixels_that_the_network_sees(
    chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loss = embedder(), DistillationLoss([embedder(1)])
    shown: list[Tensor] = []
    seen: list[Tensor] = []
    teach, network = loss.teach, model.network
    monkeypatch.setattr(loss, "teach", lambda pixels: shown.append(pixels) or teach(pixels))
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0]) if network.training else None)
    config = replace(QUICK, epochs=1, validation="none", gradient_cache=chunk, augment=Augment.named("ink-strong"))
    train(model, stripes(), loss=loss, config=config)
    assert {len(pixels) for pixels in shown} == ({16} if chunk is None else {5, 1})
    batches = [torch.cat(shown[at : at + 4]) if chunk else shown[at] for at in range(0, len(shown), 4 if chunk else 1)]
    own = [torch.cat(seen[at : at + 4]) if chunk else seen[at] for at in range(0, len(seen), 8 if chunk else 1)]
    assert len(own) == len(batches) > 1
    assert all(torch.equal(one, other) for one, other in zip(own, batches, strict=True))
    plain = {model.preprocess(image).tobytes() for image in stripes().images}
    assert not any(image.to(torch.uint8).numpy().tobytes() in plain for image in batches[0])


def test_teachers_teach_in_evaluation_mode() -> None:
    stem = ViTConfig((8, 8), 4, 1, width=16, depth=1, heads=2, stem=((8, 2), (16, 2)), drop_path=0.5)
    teacher = Embedder.create(stem, preprocess=embedder().preprocess, seed=1, device="cpu")
    teacher.network.train()
    loss = DistillationLoss([teacher])
    before = copy.deepcopy(loss._networks[0].state_dict())
    pixels = torch.from_numpy(np.stack([teacher.preprocess(image) for image in stripes().images[:6]]))
    assert torch.equal(loss.teach(pixels), loss.teach(pixels))
    loss.train()
    torch.testing.assert_close(loss.teach(pixels), torch.from_numpy(teacher.embed_pixels(pixels)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in loss._networks[0].state_dict().items())


def test_a_student_is_not_validated_on_what_a_teacher_was_trained_on() -> None:
    teachers = [embedder(1), embedder(2)]
    for seed, teacher in enumerate(teachers):
        train(teacher, stripes(), config=replace(QUICK, epochs=1, seed=seed, validation_share=0.3))
    held_out = [set(teacher.provenance["held-out classes"]) for teacher in teachers]
    assert held_out[0] != held_out[1]
    loss = DistillationLoss(teachers)
    assert set(loss.trained_classes) == {f"way {number}" for number in range(8)} - (held_out[0] & held_out[1])
    assert set(loss.held_out_classes) == held_out[0] & held_out[1]
    with pytest.raises(ConfigError, match="would be held out for validation, but a teacher was trained on it"):
        train(embedder(3), stripes(), loss=loss, config=QUICK)
    with pytest.raises(ConfigError, match="would be held out for validation"):
        train(embedder(3), stripes(), loss=loss, config=replace(QUICK, validation="images"))
    train(embedder(3), stripes(), loss=loss, config=replace(QUICK, epochs=1, validation="none"))


def test_what_does_not_go_together_is_refused() -> None:
    loss = DistillationLoss([embedder(1)])
    with pytest.raises(ConfigError, match="one teacher at least"):
        DistillationLoss([])
    for temperature in (0, 1e-4, -1, float("nan"), float("inf"), True, "warm"):
        with pytest.raises(ConfigError, match="temperature must be"):
            DistillationLoss([embedder(1)], temperature=temperature)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="invert False in the pre-processing, and the model is given True"):
        train(embedder(invert=True), stripes(), loss=loss, config=QUICK)
    for other in ({"mode": "RGB", "mean": (0.5,) * 3, "std": (0.5,) * 3}, {"scan": True, "fill": 255}):
        with pytest.raises(ConfigError, match=f"teacher 1 of 1 knows images with {next(iter(other))} "):
            loss.check_student(SimpleNamespace(preprocess=replace(embedder().preprocess, **other)))  # type: ignore[arg-type]
    padded = DistillationLoss([embedder(1, resize="pad")])
    with pytest.raises(ConfigError, match="8 x 8 pixels, and those of the model, 8 x 16, are of other proportions"):
        padded.check_student(SimpleNamespace(preprocess=Preprocess.grey((8, 16), resize="pad", invert=False)))  # type: ignore[arg-type]
    broken = embedder(1)
    broken.network.backbone.cls_token.data.fill_(float("nan"))
    for teachers, words in (
        ([embedder(1), broken], "teacher 2 has weights that are NaN"),
        (embedder(1), "must be a list of embedders; got Embedder"),
        (["runs/a"], "number 1 is a str"),
        ("runs/a", "must be a list of embedders; got str"),
    ):
        with pytest.raises(ConfigError, match=words):
            DistillationLoss(teachers)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leave the miner out"):
        train(embedder(), stripes(), loss=loss, miner=lambda *_: None, config=QUICK)
    with pytest.raises(ConfigError, match="`train` asks them"):
        loss(rows(4, 3), torch.zeros(4))
    with pytest.raises(ConfigError, match="leave the miner out"):
        loss(rows(4, 3), torch.zeros(4), (), taught=rows(4, 3))
    with pytest.raises(VectorError, match="4 images need as many rows of their teachers; got 3"):
        loss(rows(4, 3), torch.zeros(4), taught=rows(3, 3))
    alone = rows(1, 3).requires_grad_()
    assert loss(alone, torch.zeros(1), taught=rows(1, 3)).item() == 0  # of a batch whose other images are broken
    loss(alone, torch.zeros(1), taught=rows(1, 3)).backward()
    with pytest.raises(ConfigError, match="cannot compare a batch with a cross-batch memory"):
        CrossBatchMemory(loss, size=8)


def test_a_line_of_text_names_it_where_there_are_teachers() -> None:
    teachers = [embedder(1)]
    assert build_distillation("distillation(temperature=0.2)", teachers).temperature == 0.2
    assert repr(build_distillation("distillation", teachers)).startswith("DistillationLoss(teachers=[sha256:")
    with pytest.raises(ConfigError, match="teachers are for the loss distillation, not 'triplet'"):
        build_distillation("triplet", teachers)
    with pytest.raises(ConfigError, match="argument of DistillationLoss"):
        build_distillation("distillation(warmth=1)", teachers)
    with pytest.raises(ConfigError, match="which a line of text cannot hold"):
        build_distillation("distillation(teachers=3)", teachers)
    with pytest.raises(ConfigError, match="distillation needs teachers: name them with --teacher"):
        build_loss("distillation")
