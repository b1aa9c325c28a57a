"""Muon beside torch's own, AdamW beside torch's own, and both in one training."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.training.stripes import stripes
from vitembed.embedder import Embedder
from vitembed.embedding_net import EmbeddingNet
from vitembed.errors import ConfigError
from vitembed.preprocess import Preprocess
from vitembed.training import TrainConfig, train
from vitembed.training.optimizers import Muon, build_optimizer, orthogonalized
from vitembed.training.parameter_groups import hidden_matrices, parameter_groups
from vitembed.training.plan import plan_training
from vitembed.vit import ViT, ViTConfig

SHAPES = [(6, 6), (4, 9), (9, 4), (1, 7)]


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(*sets: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for row in zip(*sets, strict=True):
        gradient = torch.randn(row[0].numel(), generator=generator)
        for parameter in row:
            parameter.grad = gradient.view_as(parameter).clone()


def group(params: list[nn.Parameter], *, matrices: bool) -> dict[str, object]:
    return {"params": params, "lr": 1e-2, "weight_decay": 0.1, "matrices": matrices}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_matrices_move_as_with_torchs_muon() -> None:
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    peer = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer = Muon([group(ours, matrices=True)])
    for seed in range(5):
        give_gradients(ours, theirs, seed=seed)
        optimizer.step()
        peer.step()
    for one, other, start in zip(ours, theirs, parameters(*SHAPES), strict=True):
        moved = (other - start).norm()
        assert (one - other).norm() < 0.02 * moved  # the peer iterates in bfloat16


def test_the_rest_moves_as_with_torchs_adamw() -> None:
    shapes = [(5,), (1, 3, 4), ()]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    peer = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    optimizer = Muon([group(ours, matrices=False)])
    for seed in range(5):
        give_gradients(ours, theirs, seed=seed)
        optimizer.step()
        peer.step()
    torch.testing.assert_close(ours, theirs)


def test_a_convolution_moves_as_the_matrix_of_its_filters() -> None:
    (filters,), (matrix,) = parameters((8, 3, 3, 3)), parameters((8, 27))
    give_gradients([filters], [matrix], seed=1)
    for parameter in (filters, matrix):
        Muon([group([parameter], matrices=True)]).step()
    torch.testing.assert_close(filters.flatten(1), matrix)


@pytest.mark.parametrize("shape", [(32, 32), (16, 200), (200, 16)])
def test_singular_values_become_about_one_and_their_vectors_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=generator))[0][:, : min(shape)]
    right = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator))[0][:, : min(shape)]
    values = torch.linspace(0.2, 1, min(shape))
    found = left.T @ orthogonalized(left * values @ right.T) @ right
    diagonal = found.diagonal()
    assert (found - torch.diag(diagonal)).abs().max() < 1e-4
    assert diagonal.min() > 0.65
    assert diagonal.max() < 1.25


def test_a_zero_gradient_leaves_zero_and_no_gradient_leaves_the_parameter() -> None:
    assert not orthogonalized(torch.zeros(3, 5)).any()
    kept, moved = parameters((3, 3), (3, 3))
    before = [parameter.detach().clone() for parameter in (kept, moved)]
    moved.grad = torch.ones(3, 3)
    Muon([group([kept, moved], matrices=True)]).step()
    assert torch.equal(kept, before[0])
    assert not torch.equal(moved, before[1])


def test_it_goes_on_from_what_was_saved() -> None:
    def moved(interrupted: bool) -> list[nn.Parameter]:
        params = parameters((4, 6), (5,))
        groups = [group(params[:1], matrices=True), group(params[1:], matrices=False)]
        optimizer = Muon(groups)
        for seed in range(4):
            if interrupted and seed == 2:
                state = optimizer.state_dict()
                optimizer = Muon([{**one} for one in groups])
                optimizer.load_state_dict(state)
            give_gradients(params, seed=seed)
            optimizer.step()
        return params

    for one, other in zip(moved(False), moved(True), strict=True):
        assert torch.equal(one, other)


def test_muon_takes_the_matrices_of_the_network_alone() -> None:
    model = Embedder.create("N/4", stem="conv", preprocess=Preprocess.grey((8, 8)))
    loss = nn.Linear(3, 4)
    groups = parameter_groups(model.network, loss, model.device, learning_rate=1.0, weight_decay=0.1)
    optimizer = build_optimizer("muon", groups)
    assert isinstance(optimizer, Muon)
    taken = {id(one) for part in optimizer.param_groups if part["matrices"] for one in part["params"]}
    names = {name for name, one in model.network.named_parameters() if id(one) in taken}
    assert {"backbone.patch_embed.stem.0.weight", "backbone.blocks.0.attn.qkv.weight"} <= names
    assert not any(name.endswith(("bias", "pos_embed", "_token")) or "norm" in name for name in names)
    assert not taken & {id(one) for one in loss.parameters()}


def test_heads_depthwise_convolutions_and_tables_are_left_to_adamw() -> None:
    network = EmbeddingNet(
        ViT(ViTConfig((8, 8), 4, 1, width=16, depth=1, heads=2, num_classes=5)), mean=[0.5], std=[0.5]
    )
    network.extra = nn.ModuleDict(  # what other backbones have
        {
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "attention": nn.MultiheadAttention(4, 2),
            "table": nn.Embedding(9, 4),
        }
    )
    found = hidden_matrices(network)
    names = {name for name, one in network.named_parameters() if id(one) in found}
    assert not any("head." in name or "depthwise" in name or "table" in name for name in names)
    assert {"extra.attention.in_proj_weight", "extra.attention.out_proj.weight"} <= names
    assert {"backbone.patch_embed.proj.weight", "backbone.blocks.0.mlp.fc1.weight"} <= names


def test_a_training_with_muon_learns_and_can_be_planned() -> None:
    config = TrainConfig(epochs=3, classes_per_batch=4, optimizer="muon", learning_rate=5e-3, validation="none")
    model = Embedder.create("N/4", stem="conv", preprocess=Preprocess.grey((8, 8)))
    plan = plan_training(model, stripes(), config=config)
    usual = plan_training(model, stripes(), config=dataclasses.replace(config, optimizer="adamw"))
    assert usual.memory.moments == 2 * usual.memory.gradients
    assert plan.memory.moments < 0.6 * usual.memory.moments
    result = train(model, stripes(), config=config)
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < losses[0]


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'muon'"):
        TrainConfig(optimizer="mun")  # type: ignore[arg-type]


def test_a_closure_computes_the_gradients_first() -> None:
    (parameter,) = parameters((3, 4))
    before = parameter.detach().clone()

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert Muon([group([parameter], matrices=True)]).step(closure) == pytest.approx(float(before.square().sum()))
    assert not torch.equal(parameter, before)
