"""The collapse doctor: each cause is provoked in real trainings, healthy ones are left alone, its memory is sound."""

import dataclasses
import itertools
import json
import math
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import benchmarks.parity
from tests.training.stripes import stripes
from vitembed.errors import CheckpointError, ConfigError, VectorError
from vitembed.training import ContrastiveLoss, CrossEntropyLoss, TripletLoss
from vitembed.training.health.causes import POINT, TABLE
from vitembed.training.health.collapse import CAUSES, CollapseDoctor, Diagnosis
from vitembed.training.health.signals import Signals, measure

FOLDER = Path(benchmarks.parity.__file__).parent
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)  # where the script finds timing.py
    RUNS = runpy.run_path(str(FOLDER / "collapse.py"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tellings(run: Any) -> Iterator[tuple[int, Diagnosis]]:
    """Train a tiny ViT on stripes and yield what the doctor says, and when."""
    data = stripes(per_class=16)
    pixels = torch.from_numpy(np.stack(data.images))[:, None]
    labels = torch.from_numpy(data.labels)
    yield from RUNS["tellings"](run, RUNS["tiny"](16), pixels, labels, steps=110, every=2, patience=8)


def by_name(run: Any) -> str:
    return run.name


STOPPED = {  # continuing would be useless in each of these
    "not-finite (embeddings)",
    "not-finite (loss)",
    "not-finite (gradient)",
    "one-class",
    "no-positives",
    "frozen-backbone",
    "no-learning-rate",
    "no-active-triplets (never)",
    "equal-distances (pull)",
    "gradient-vanishing",
    "loss-at-margin",
}


@pytest.mark.parametrize("run", RUNS["BROKEN"], ids=by_name)
def test_a_training_that_is_broken_on_purpose_is_told_so_by_name_and_stopped_if_useless(run: Any) -> None:
    # Other causes may be told before: gradients explode, say, on the way to NaN.
    wanted = (diagnosis for _, diagnosis in tellings(run) if diagnosis.cause == run.cause)
    assert any(diagnosis.fatal or run.name not in STOPPED for diagnosis in wanted)


@pytest.mark.parametrize("run", RUNS["CHAOTIC"], ids=by_name)
def test_a_rate_that_is_far_too_high_is_told_by_one_name_or_another(run: Any) -> None:
    assert next(tellings(run))


def test_a_diagnosis_is_one_line() -> None:
    diagnosis = CollapseDoctor().observe(3, dataclasses.replace(HEALTHY, loss=math.nan))
    assert str(diagnosis) == (
        "not-finite: at step 3 the loss had NaN or infinite values (loss nan, gradient 2); the embeddings are finite, "
        "so look at the loss, its settings and the labels; in fp16 or bf16 try fp32"
    )


def test_the_benchmark_provokes_every_cause() -> None:
    assert {run.cause for run in RUNS["BROKEN"]} == set(CAUSES)


@pytest.mark.parametrize("run", RUNS["HEALTHY"], ids=by_name)
def test_a_healthy_training_is_left_alone(run: Any) -> None:
    assert list(tellings(run)) == []


def test_the_benchmark_prints_a_row_for_each_telling(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["collapse.py", "--steps", "12", "--only", "one-class", "no-positives", "healthy"])
    runpy.run_path(str(FOLDER / "collapse.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(RUNS["HEALTHY"]) + 2
    assert all(line.endswith("never") for line in lines[2:-2])
    assert "labels all alike" in lines[-2]
    assert "stops: one-class: at step 5 the 32 images of a batch are of one class" in lines[-2]


HEALTHY = Signals(
    loss=0.15,
    images=32,
    classes=8,
    positive_distance=0.6,
    negative_distance=1.3,
    spread=0.9,
    rank=6.0,
    most_rank=7,
    active=0.1,
    gradient=2.0,
    learning_rate=1e-3,
    trainable=30,
    reached=30,
)
AT_MARGIN = dataclasses.replace(HEALTHY, loss=0.2, positive_distance=0.5, negative_distance=0.505)
SPENT = dataclasses.replace(HEALTHY, loss=0.0, active=0.0, gradient=0.0, reached=0)
IN_A_POINT = dataclasses.replace(
    HEALTHY, loss=0.2, positive_distance=0.001, negative_distance=0.001, spread=0.0005, active=1.0
)


def causes(doctor: CollapseDoctor, looks: list[Signals]) -> list[tuple[int, str, bool]]:
    said = ((step, doctor.observe(step, look)) for step, look in enumerate(looks))
    return [(step, diagnosis.cause, diagnosis.fatal) for step, diagnosis in said if diagnosis]


def test_a_cause_is_told_when_it_has_lasted_and_again_only_after_it_was_gone() -> None:
    doctor = CollapseDoctor(margin=0.2, patience=4)
    looks = [HEALTHY, *[SPENT] * 9, *[HEALTHY] * 3, *[SPENT] * 4, *[HEALTHY] * 4, *[SPENT] * 4]
    assert causes(doctor, looks) == [(4, "no-active-triplets", False), (24, "no-active-triplets", False)]


def test_a_look_without_the_sign_delays_and_does_not_hide() -> None:
    doctor = CollapseDoctor(margin=0.2, patience=4)
    assert causes(doctor, [HEALTHY, SPENT, SPENT, HEALTHY, SPENT, SPENT, HEALTHY, SPENT, SPENT]) == [
        (8, "no-active-triplets", False)
    ]


def test_what_was_a_warning_becomes_fatal_when_it_lasts() -> None:
    doctor = CollapseDoctor(margin=0.2, patience=4)
    assert causes(doctor, [HEALTHY, *[IN_A_POINT] * 12]) == [
        (4, "equal-distances", False),
        (12, "equal-distances", True),
    ]
    doctor = CollapseDoctor(margin=0.2, patience=4)
    small = dataclasses.replace(IN_A_POINT, spread=0.002)  # cosines can still be told apart
    assert causes(doctor, [HEALTHY, *[small] * 40]) == [(4, "equal-distances", False)]
    doctor = CollapseDoctor(margin=0.2, patience=4)
    assert causes(doctor, [HEALTHY, *[AT_MARGIN] * 20]) == [(4, "loss-at-margin", False), (20, "loss-at-margin", True)]


def test_nan_is_fatal_at_once_and_its_place_is_named() -> None:
    broken = {"spread": "embeddings", "loss": "loss", "gradient": "gradient"}
    for (field, word), value in itertools.product(broken.items(), (math.nan, math.inf)):
        diagnosis = CollapseDoctor().observe(7, dataclasses.replace(HEALTHY, **{field: value}))
        assert diagnosis is not None
        assert (diagnosis.cause, diagnosis.fatal) == ("not-finite", True)
        assert diagnosis.evidence.startswith(f"at step 7 the {word} had NaN or infinite values")
    everything = dataclasses.replace(HEALTHY, loss=math.nan, spread=math.nan, gradient=math.nan)
    diagnosis = CollapseDoctor().observe(0, everything)
    assert diagnosis is not None
    assert "the embeddings had" in diagnosis.evidence


def test_a_training_that_begins_in_a_point_is_not_told_so_while_it_parts_or_its_rate_rises() -> None:
    start = dataclasses.replace(IN_A_POINT, spread=0.005, loss=0.2)
    growing = [dataclasses.replace(start, spread=0.005 * 1.1**step) for step in range(60)]
    growing = [look if look.spread < POINT else HEALTHY for look in growing]
    assert causes(CollapseDoctor(margin=0.2, patience=6), growing) == []
    warming = [dataclasses.replace(start, learning_rate=1e-6 * (step + 1)) for step in range(60)]
    said = causes(CollapseDoctor(margin=0.2, patience=6), [*warming, *[start] * 7])
    assert said == [(66, "equal-distances", False)]


def test_a_warm_up_is_no_time_to_say_that_the_loss_stays_at_the_margin_or_the_rate_at_zero() -> None:
    warming = [dataclasses.replace(AT_MARGIN, learning_rate=1e-11 * (step + 1)) for step in range(60)]
    assert causes(CollapseDoctor(margin=0.2, patience=6), warming) == []


def test_a_rate_that_falls_to_nothing_in_the_end_is_no_fault() -> None:
    looks = [dataclasses.replace(HEALTHY, learning_rate=1e-3 * 0.1**step) for step in range(40)]
    assert causes(CollapseDoctor(margin=0.2, patience=4), looks) == []


def test_equally_far_pairs_of_a_loss_without_a_margin_are_told() -> None:
    alike = dataclasses.replace(HEALTHY, positive_distance=1.41, negative_distance=1.414, active=None)
    assert causes(CollapseDoctor(patience=4), [HEALTHY, *[alike] * 40]) == [(4, "equal-distances", False)]


def test_a_loss_that_needs_no_pairs_may_have_batches_without() -> None:
    looks = [dataclasses.replace(HEALTHY, classes=32, positive_distance=None, active=None)] * 20
    assert causes(CollapseDoctor(needs_pairs=False, patience=4), looks) == []
    assert causes(CollapseDoctor(patience=5), looks) == [(0, "no-positives", True)]


def test_a_solved_task_has_no_frozen_backbone_and_no_vanished_gradient() -> None:
    assert causes(CollapseDoctor(margin=0.2, patience=4), [HEALTHY, *[SPENT] * 40]) == [
        (4, "no-active-triplets", False)
    ]


def test_a_backbone_cut_off_from_the_loss_is_frozen_although_it_requires_gradients() -> None:
    assert causes(CollapseDoctor(patience=10), [dataclasses.replace(HEALTHY, reached=0)] * 3) == [
        (2, "frozen-backbone", True)
    ]
    deliberate = dataclasses.replace(HEALTHY, trainable=None, reached=None)
    assert causes(CollapseDoctor(patience=10), [deliberate] * 30) == []


def test_the_doctor_learns_margin_and_kind_from_the_loss() -> None:
    from pytorch_metric_learning.losses import ArcFaceLoss

    looks = [AT_MARGIN] * 4
    assert causes(CollapseDoctor.of_loss(TripletLoss(0.2), patience=4), looks) == [(3, "loss-at-margin", False)]
    contrastive = [dataclasses.replace(look, loss=0.99) for look in looks]
    assert causes(CollapseDoctor.of_loss(ContrastiveLoss(), patience=4), contrastive) == [(3, "loss-at-margin", False)]
    one_class = [dataclasses.replace(HEALTHY, classes=1, negative_distance=None, active=None)] * 4
    for loss in (CrossEntropyLoss(), ArcFaceLoss(8, 16)):
        assert causes(CollapseDoctor.of_loss(loss, patience=4), one_class) == []
    arc = [dataclasses.replace(look, loss=50.0, positive_distance=0.4, active=None) for look in looks]
    assert causes(CollapseDoctor.of_loss(ArcFaceLoss(8, 16), patience=4), arc) == []  # its margin is an angle


LOOKS = st.sampled_from(
    [
        HEALTHY,
        AT_MARGIN,
        SPENT,
        IN_A_POINT,
        dataclasses.replace(HEALTHY, rank=1.2),
        dataclasses.replace(HEALTHY, spread=0.05, rank=1.4),
        dataclasses.replace(HEALTHY, gradient=1e9),
        dataclasses.replace(HEALTHY, learning_rate=2e-3, gradient=None, active=None),
    ]
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(looks=st.lists(LOOKS, min_size=10, max_size=60), cut=st.integers(0, 60))
def test_a_doctor_that_goes_on_from_a_saved_state_says_the_same(looks: list[Signals], cut: int) -> None:
    whole = causes(CollapseDoctor(margin=0.2, patience=3), looks)
    before, after = CollapseDoctor(margin=0.2, patience=3), CollapseDoctor(margin=0.2, patience=3)
    said = [before.observe(step, look) for step, look in enumerate(looks[:cut])]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    said += [after.observe(step, look) for step, look in enumerate(looks[cut:], cut)]
    assert [(step, told.cause, told.fatal) for step, told in enumerate(said) if told] == whole


def test_a_foreign_state_is_refused_and_changes_nothing() -> None:
    doctor = CollapseDoctor(patience=4)
    causes(doctor, [HEALTHY, SPENT])
    before = doctor.state_dict()
    state: dict[str, Any] = json.loads(json.dumps(before))
    for broken in (
        {},
        {**state, "past": {"mood": 1}},
        {**state, "counts": [1]},
        {**state, "counts": {"measles": 1}},
        {**state, "told": ["measles"]},
        {**state, "told": None},
    ):
        with pytest.raises(CheckpointError, match="collapse doctor"):
            doctor.load_state_dict(broken)
        assert doctor.state_dict() == before


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="patience is a number of looks and must be at least 1; got 0"):
        CollapseDoctor(patience=0)
    with pytest.raises(ConfigError, match="margin must be a finite number"):
        CollapseDoctor(margin=math.nan)


def test_no_two_rows_of_the_table_share_a_count() -> None:
    assert len({cause.key for cause in TABLE}) == len(TABLE)


def rows(count: int, dim: int, *, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(count, dim, generator=random), dim=1)


@pytest.mark.parametrize(("count", "dim"), [(24, 8), (8, 24), (2, 2)])
def test_distances_spread_and_rank_equal_those_of_a_plain_loop(count: int, dim: int) -> None:
    z, labels = rows(count, dim), torch.arange(count) % 4
    found = measure(z, labels, 0.5)
    near, far = [], []
    for i, j in itertools.permutations(range(count), 2):
        (near if labels[i] == labels[j] else far).append(float((z[i] - z[j]).norm()))
    assert found.positive_distance == (pytest.approx(np.mean(near), abs=1e-5) if near else None)
    assert found.negative_distance == pytest.approx(np.mean(far), abs=1e-5)
    centred = z.double().numpy() - z.double().numpy().mean(0)
    assert found.spread == pytest.approx(math.sqrt((centred**2).sum() / count), abs=1e-6)
    singular = np.linalg.svd(centred, compute_uv=False)
    shares = singular[singular > 1e-6] / singular.sum()
    assert found.rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert (found.images, found.classes) == (count, min(4, count))
    assert found.most_rank == min(count - 1, dim, min(4, count) - 1)


def test_the_effective_rank_of_hand_worked_embeddings() -> None:
    cross = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert measure(cross, torch.arange(4), 0.0).rank == pytest.approx(2)  # singular values 1 : 1
    # Heights h and lengths l of four corners: singular values 2 l and 2 h, in the ratio of 3 to 1.
    length = math.sqrt(0.9)
    corners = torch.tensor([[x * length, y * length / 3] for x, y in itertools.product((1, -1), repeat=2)])
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert measure(corners, torch.arange(4), 0.0).rank == pytest.approx(expected, rel=1e-5)
    assert measure(rows(1, 4).expand(5, 4), torch.arange(5), 0.0).rank == 0.0


def test_the_mean_cosine_of_all_pairs_follows_from_the_spread() -> None:
    z = rows(16, 6)
    assert 1 - measure(z, torch.zeros(16), 0.0).spread ** 2 == pytest.approx(float((z @ z.T).mean()), abs=1e-6)


def test_a_measurement_draws_nothing_and_keeps_no_graph() -> None:
    z = rows(8, 4).requires_grad_()
    state = torch.get_rng_state()
    found = measure(z, torch.arange(8) // 2, z.sum(), active=torch.tensor(0.25), gradient=torch.tensor(3.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.loss, found.active, found.gradient) == (pytest.approx(float(z.detach().sum())), 0.25, 3.0)
    assert (found.learning_rate, found.trainable, found.reached) == (None, None, None)
    assert all(value is None or isinstance(value, int | float) for value in dataclasses.astuple(found))


def test_half_precision_a_single_image_and_a_huge_batch_are_measured() -> None:
    half = measure(rows(16, 8).bfloat16(), torch.arange(16) // 2, 0.1)
    assert half.spread == pytest.approx(measure(rows(16, 8), torch.arange(16) // 2, 0.1).spread, abs=0.01)
    one = measure(rows(1, 8), torch.tensor([3]), 0.1)
    assert (one.positive_distance, one.negative_distance, one.spread, one.rank, one.most_rank) == (None, None, 0, 0, 0)
    assert causes(CollapseDoctor(needs_pairs=False, patience=2), [one] * 9) == []
    huge = measure(rows(4096, 8), torch.arange(4096) // 4, 0.1)
    assert (huge.images, huge.classes, huge.most_rank) == (4096, 1024, 8)
    assert huge.spread == pytest.approx(1, abs=0.05)
    assert huge.rank == pytest.approx(8, abs=0.1)


def test_nan_in_embeddings_is_seen_in_the_spread() -> None:
    z = rows(8, 4)
    z[3, 2] = math.nan
    assert math.isnan(measure(z, torch.arange(8) // 2, 0.1).spread)


def test_only_gradients_that_are_not_zero_reach_the_backbone() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    backbone[0].requires_grad_(False)
    backbone[1](rows(8, 4)).sum().backward()
    assert backbone[1].weight.grad is not None
    backbone[1].weight.grad.zero_()
    found = measure(rows(8, 4), torch.arange(8) // 2, 0.1, backbone=backbone)
    assert (found.trainable, found.reached) == (4, 1)


@pytest.mark.parametrize(("shape", "labels"), [((8,), 8), ((8, 4), 7), ((0, 4), 0)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], labels: int) -> None:
    with pytest.raises(VectorError, match=r"expected embeddings \(B, D\) and labels \(B,\), B >= 1; got"):
        measure(torch.zeros(shape), torch.zeros(labels), 0.1)
