"""The training loop: it learns, repeats, keeps the best, records what it did, and stops with a reason."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.stripes import stripes
from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, DataError, TrainingError
from vitembed.preprocess import Preprocess
from vitembed.training import (
    Augment,
    ContrastiveLoss,
    CrossEntropyLoss,
    TrainConfig,
    TripletLoss,
    run,
    stepper,
    train,
)
from vitembed.training.health.signals import mean_distances
from vitembed.training.parameter_groups import parameter_groups
from vitembed.vit import ViTConfig

QUICK: dict[str, Any] = {"epochs": 2, "classes_per_batch": 4, "images_per_class": 4, "workers": 0}


def embedder(seed: int = 0, device: str = "cpu", **options: Any) -> Embedder:
    config = ViTConfig((8, 8), 4, 1, width=16, depth=2, heads=2, stem=((8, 2), (16, 2)), **options)
    preprocess = Preprocess.grey((8, 8), resize="squash", invert=False)
    return Embedder.create(config, preprocess=preprocess, seed=seed, device=device)


def test_training_lowers_the_loss_and_finds_neighbours_of_the_class() -> None:
    model = embedder()
    config = TrainConfig(
        epochs=40, classes_per_batch=8, images_per_class=4, validation="images", validation_share=0.25, workers=0
    )
    result = train(model, stripes(per_class=16), loss=TripletLoss(0.3, "all"), config=config)
    first, last = result.history[0], result.history[-1]
    assert last["active"] < 0.7 * first["active"]
    assert last["positive_distance"] / last["negative_distance"] < 0.8 * (
        first["positive_distance"] / first["negative_distance"]
    )
    assert result.recall_at_1 is not None
    assert result.recall_at_1 > 0.7
    assert result.recall_at_1 == max(record["recall@1"] for record in result.history)


def test_the_folder_holds_the_best_model_the_history_and_the_curve(tmp_path: Path) -> None:
    model = embedder()
    result = train(model, stripes(), config=TrainConfig(**QUICK), out=tmp_path / "run")
    loaded = Embedder.from_pretrained(tmp_path / "run", device="cpu")
    assert loaded.fingerprint == model.fingerprint
    assert json.loads((tmp_path / "run" / "history.json").read_text()) == result.history
    assert [record["epoch"] for record in result.history] == [1, 2]
    assert set(result.history[0]) == {
        "epoch",
        "loss",
        "active",
        "positive_distance",
        "negative_distance",
        "recall@1",
        "learning_rate",
        "seconds",
    }
    with Image.open(tmp_path / "run" / "curve.png") as curve:
        assert curve.format == "PNG"
    provenance = loaded.provenance
    assert provenance["epoch"] == result.best_epoch
    assert provenance["validation recall@1"] == result.recall_at_1
    assert len(provenance["held-out classes"]) == 2
    assert len(provenance["trained classes"]) == 6
    assert set(provenance["trained classes"]).isdisjoint(provenance["held-out classes"])


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    fingerprints = []
    for seed in (3, 3, 4):
        model = embedder()
        config = TrainConfig(**QUICK, augment=Augment.named("photo"), seed=seed, validation="none")
        train(model, stripes(), config=config)
        fingerprints.append(model.fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_the_model_gets_the_weights_of_the_best_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = embedder()
    recalls = iter([0.5, 0.9, 0.9, 0.2])
    fingerprints = []

    def validate(model: Embedder, *_: object) -> dict[str, float]:
        fingerprints.append(model.fingerprint)
        return {"recall@1": next(recalls)}

    monkeypatch.setattr(run, "validate", validate)
    result = train(model, stripes(), config=TrainConfig(**{**QUICK, "epochs": 4}), out=tmp_path / "run")
    assert (result.best_epoch, result.recall_at_1) == (3, 0.9)  # the later of equals
    assert len(set(fingerprints)) == 4
    assert model.fingerprint == fingerprints[2]
    assert Embedder.from_pretrained(tmp_path / "run").fingerprint == fingerprints[2]


def test_without_validation_the_last_epoch_counts() -> None:
    result = train(embedder(), stripes(), config=TrainConfig(**QUICK, validation="none"))
    assert (result.best_epoch, result.recall_at_1) == (2, None)


@pytest.mark.parametrize("loss", [TripletLoss(0.2, "hard"), ContrastiveLoss(), None])
def test_our_losses_train(loss: Any) -> None:
    model = embedder()
    before = model.fingerprint
    result = train(model, stripes(), loss=loss, config=TrainConfig(**QUICK, validation="none"))
    assert model.fingerprint != before
    assert 0 <= result.history[-1]["active"] <= 1


def test_losses_and_miners_of_pytorch_metric_learning_train_and_their_parameters_too() -> None:
    from pytorch_metric_learning import losses, miners

    miner = miners.MultiSimilarityMiner()
    train(
        embedder(),
        stripes(),
        loss=losses.MultiSimilarityLoss(),
        miner=miner,
        config=TrainConfig(**QUICK, validation="none"),
    )
    proxies = losses.ProxyAnchorLoss(num_classes=8, embedding_size=16)
    before = proxies.proxies.detach().clone()
    result = train(embedder(), stripes(), loss=proxies, config=TrainConfig(**QUICK, validation="none"))
    assert not torch.equal(proxies.proxies, before)
    assert "active" not in result.history[0]


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    rates = [stepper._rate(step, warmup=10, steps=110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1
    assert rates[60] == pytest.approx(0.5)
    assert rates[-1] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_weight_decay_is_for_matrices_alone() -> None:
    model = embedder(distilled=True, registers=2)
    decayed, plain = parameter_groups(model.network, TripletLoss(), model.device, learning_rate=1e-3, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in model.network.named_parameters()}
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0
    assert all("weight" in names[id(p)] and "norm" not in names[id(p)] for p in decayed["params"])
    kept = {names[id(p)].removeprefix("backbone.") for p in plain["params"]}
    assert {"cls_token", "dist_token", "reg_token", "pos_embed", "norm.weight"} <= kept
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_the_distances_are_those_of_a_plain_loop() -> None:
    embeddings = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = [0, 0, 1, 1, 1, 2]
    kinds: dict[bool, list[float]] = {True: [], False: []}
    for i in range(6):
        for j in range(6):
            if i != j:
                kinds[labels[i] == labels[j]].append((embeddings[i] - embeddings[j]).norm().item())
    figures = mean_distances(embeddings, torch.tensor(labels))
    assert figures["positive_distance"].item() == pytest.approx(np.mean(kinds[True]), abs=1e-5)
    assert figures["negative_distance"].item() == pytest.approx(np.mean(kinds[False]), abs=1e-5)


def test_a_loss_that_becomes_nan_stops_with_advice_and_keeps_the_model(tmp_path: Path) -> None:
    calls = 0

    def loss(embeddings: torch.Tensor, labels: torch.Tensor, tuples: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return TripletLoss()(embeddings, labels) * (float("nan") if calls > 4 else 1)

    with pytest.raises(TrainingError, match="lower the learning rate"):
        train(embedder(), stripes(), loss=loss, config=TrainConfig(**{**QUICK, "epochs": 5}), out=tmp_path / "run")
    assert np.isfinite(Embedder.from_pretrained(tmp_path / "run").encode([np.zeros((8, 8), np.uint8)])).all()


def test_an_earlier_model_is_overwritten_on_purpose_alone(tmp_path: Path) -> None:
    old = embedder()
    old.save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="already holds a model"):
        train(embedder(seed=1), stripes(), config=TrainConfig(**QUICK), out=tmp_path)
    assert Embedder.from_pretrained(tmp_path).fingerprint == old.fingerprint
    train(embedder(seed=1), stripes(), config=TrainConfig(**QUICK), out=tmp_path, overwrite=True)
    assert Embedder.from_pretrained(tmp_path).fingerprint != old.fingerprint


def test_training_in_mixed_precision_leaves_the_embedder_as_it_is_saved(tmp_path: Path) -> None:
    images = [np.full((8, 8), 9, np.uint8), np.eye(8, dtype=np.uint8) * 200]
    for number, precision in enumerate(("bf16", "fp32", "bf16")):  # accelerate's settings belong to the process
        model = embedder()
        train(model, stripes(), config=TrainConfig(**QUICK, precision=precision), out=tmp_path / str(number))
        loaded = Embedder.from_pretrained(tmp_path / str(number), device="cpu")
        assert loaded.fingerprint == model.fingerprint
        np.testing.assert_array_equal(loaded.encode(images), model.encode(images))


def test_going_on_keeps_held_out_what_was_never_seen() -> None:
    model = embedder()
    train(model, stripes(), config=TrainConfig(**QUICK))
    first, held = model.fingerprint, model.provenance["held-out classes"]
    train(model, stripes(), config=TrainConfig(**QUICK, seed=5))
    assert model.provenance["held-out classes"] == held
    assert model.provenance["initialised from"] == first
    train(model, stripes(), config=TrainConfig(**QUICK, validation="none"))
    assert model.provenance["held-out classes"] == []
    assert len(model.provenance["trained classes"]) == 8
    train(model, stripes(), config=TrainConfig(**QUICK))
    assert model.provenance["held-out classes"] == []  # all of them have been trained on by now


def test_after_an_error_the_model_has_the_weights_of_its_best_epoch() -> None:
    model = embedder()
    steps = 0

    def loss(embeddings: torch.Tensor, labels: torch.Tensor, tuples: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        return TripletLoss()(embeddings, labels)

    before = model.fingerprint
    with pytest.raises(KeyboardInterrupt):
        train(model, stripes(), loss=loss, config=TrainConfig(**{**QUICK, "epochs": 9}))
    assert model.provenance["epoch"] == 1
    assert model.fingerprint != before
    assert not model.network.training


def test_too_little_data_is_said_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 4 classes; got 1"):
        train(embedder(), stripes(classes=1), config=TrainConfig(**QUICK), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot create"):
        train(embedder(), stripes(), config=TrainConfig(**QUICK), out=tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"clip": -1}, "clip"),
        ({"warmup": 1}, "warmup"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"workers": -1}, "workers"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"classes_per_batch": 1}, "classes_per_batch"),
        ({"images_per_class": 1}, "images_per_class"),
        ({"validation": "class"}, "did you mean 'classes'"),
        ({"validation_share": 7}, "validation_share"),
        ({"seed": -1}, "seed"),
        ({"patch_dropout": 1}, "patch_dropout"),
        ({"patch_dropout": float("nan")}, "patch_dropout"),
        ({"head": "mlpp"}, "did you mean 'mlp'"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**values)


def test_precision_is_mixed_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert stepper.precision_on(cpu, "auto") == "fp32"
    assert stepper.precision_on(cpu, "fp32") == "fp32"
    assert stepper.precision_on(cpu, "bf16") == "bf16"
    for has, word in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has: has)
        assert stepper.precision_on(torch.device("cuda"), "auto") == word


def tokens_seen(model: Embedder) -> dict[bool, set[int]]:
    """Collect how many tokens the first block is given, in training and outside of it."""
    seen: dict[bool, set[int]] = {True: set(), False: set()}

    def note(block: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[block.training].add(inputs[0].shape[1])

    model.network.vit.blocks[0].register_forward_pre_hook(note)
    return seen


def test_patch_dropout_leaves_patches_out_in_training_alone() -> None:
    model = embedder()
    seen = tokens_seen(model)
    train(model, stripes(), config=TrainConfig(**QUICK, patch_dropout=0.5))
    assert seen == {True: {1 + 2}, False: {1 + 4}}  # CLS and the patches
    assert model.network.vit.patch_dropout == 0


def test_gradient_checkpointing_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitembed.vit import network

    calls = []

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return checkpoint(*arguments, **options)

    checkpoint = network.checkpoint
    monkeypatch.setattr(network, "checkpoint", counting)
    states = []
    for recompute in (False, True):
        model = embedder(drop_path=0.3)
        config = TrainConfig(**QUICK, gradient_checkpointing=recompute, validation="none")
        train(model, stripes(), config=config)
        assert bool(calls) == recompute
        assert model.network.vit.gradient_checkpointing is False
        states.append(model.network.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, msg=name)


def test_the_network_is_as_it_was_after_an_error() -> None:
    model = embedder()
    vit = model.network.vit
    vit.patch_dropout = 0.25

    def loss(embeddings: torch.Tensor, labels: torch.Tensor, tuples: object) -> torch.Tensor:
        assert (vit.patch_dropout, vit.gradient_checkpointing) == (0.5, True)
        raise KeyboardInterrupt

    config = TrainConfig(**QUICK, patch_dropout=0.5, gradient_checkpointing=True)
    with pytest.raises(KeyboardInterrupt):
        train(model, stripes(), loss=loss, config=config)
    assert (vit.patch_dropout, vit.gradient_checkpointing) == (0.25, False)


def test_another_backbone_is_trained_but_has_no_patches_to_drop() -> None:
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16))
    preprocess = Preprocess.grey((8, 8), resize="squash")
    model = Embedder.from_module(flat, preprocess, device="cpu")
    before = model.fingerprint
    train(model, stripes(), config=TrainConfig(**QUICK))
    assert model.fingerprint != before
    with pytest.raises(ConfigError, match="Sequential"):
        train(model, stripes(), config=TrainConfig(**QUICK, patch_dropout=0.5))


@pytest.mark.parametrize("loss", [TripletLoss(), CrossEntropyLoss()])
def test_a_compiled_training_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch, loss: Any) -> None:
    compiled = []
    real = torch.compile

    def traced(function: Any) -> Any:  # the whole way but for the generated code, which takes half a minute to build
        compiled.append(function)
        return real(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    states = []
    for compile_network in (False, True):
        model = embedder()
        train(model, stripes(), loss=loss, config=TrainConfig(**QUICK, compile=compile_network))
        assert len(compiled) == compile_network
        states.append(model.network.state_dict())
    for name, tensor in states[0].items():
        kept = torch.ones(len(tensor) if tensor.ndim else 1, dtype=torch.bool)
        if name.endswith("qkv.bias"):  # no logit's softmax depends on the keys' bias: its gradient is rounding alone
            kept[len(tensor) // 3 : 2 * len(tensor) // 3] = False
        torch.testing.assert_close(
            states[1][name].reshape(len(kept), -1)[kept],
            tensor.reshape(len(kept), -1)[kept],
            msg=name,
            rtol=1e-3,
            atol=1e-4,
        )


def test_a_network_that_cannot_be_compiled_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile

    def backend(*_: Any) -> Any:
        raise RuntimeError("no working C++ compiler found\n\nand more")

    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=backend))
    with pytest.raises(ConfigError, match=r"cannot translate .*no working C\+\+ compiler found\); on a processor"):
        train(embedder(), stripes(), config=TrainConfig(**QUICK, compile=True))


def test_the_progress_bar_shows_loss_active_share_and_distances(capfd: pytest.CaptureFixture[str]) -> None:
    train(embedder(), stripes(), config=TrainConfig(**QUICK, validation="none"), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    for word in ("epoch 2/2", "loss=", "active=", "positive_distance=", "negative_distance="):
        assert word in err


def test_mixed_precision_leaves_the_pixels_as_they_are() -> None:
    batches = []
    for precision in ("fp32", "bf16"):
        model = embedder()
        seen: list[torch.Tensor] = []
        model.network.vit.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].clone()))
        settings: Any = {**QUICK, "epochs": 1, "validation": "none", "precision": precision}
        train(model, stripes(), config=TrainConfig(**settings, augment=Augment.named("photo")))
        batches.append(seen)
    assert len(batches[0]) == len(batches[1]) > 1
    for exact, mixed in zip(*batches, strict=True):
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, exact)


def test_the_gradient_is_clipped_as_one_with_that_of_the_parameters_of_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Proxies(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proxies = torch.nn.Parameter(torch.ones(3, 4))

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return 1e3 * (features @ self.proxies.T).sum()

    network, loss = torch.nn.Linear(5, 4), Proxies()
    config = TrainConfig(learning_rate=0.1, weight_decay=0, warmup=0, precision="fp32", clip=0.5)
    groups = parameter_groups(network, loss, torch.device("cpu"), learning_rate=0.1, weight_decay=0)
    steps = stepper.Stepper(groups, torch.device("cpu"), config, steps=9)
    raw = loss(network(torch.ones(2, 5)))
    expected = torch.autograd.grad(raw, [*network.parameters(), loss.proxies], retain_graph=True)
    monkeypatch.setattr(steps._optimizer, "zero_grad", lambda: None)  # what was stepped along stays to be seen
    steps.step(raw)
    total = torch.stack([gradient.norm() for gradient in expected]).norm()
    for parameter, gradient in zip([*network.parameters(), loss.proxies], expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 0.5 * gradient / total)  # a norm of 0.5 in all


def test_the_origin_of_a_checkpoint_is_handed_on_from_training_to_training() -> None:
    model = embedder()
    base = {"source": "timm:vit_x", "family": "timm", "revision": "abc", "licence": "mit", "notes": ["assumed"]}
    model.provenance = dict(base)
    for validation in ("classes", "none"):
        train(model, stripes(), config=TrainConfig(**QUICK, validation=validation))
        assert model.provenance["base"] == base
        assert not base.keys() & model.provenance.keys()
    assert len(model.provenance["trained classes"]) == 8
    fresh = embedder()
    train(fresh, stripes(), config=TrainConfig(**QUICK))
    assert "base" not in fresh.provenance
