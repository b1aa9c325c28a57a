"""Groups hold every parameter once, and the rate falls from block to block."""

import pytest
import timm
import torch
from pytorch_metric_learning import losses

from vitembed.embedding_net import EmbeddingNet, ForeignBackbone
from vitembed.errors import ConfigError
from vitembed.training import TripletLoss
from vitembed.training.parameter_groups import parameter_groups
from vitembed.vit import ViT, ViTConfig

CPU = torch.device("cpu")
CONFIG = ViTConfig((8, 8), 4, 1, width=16, depth=3, heads=2, num_classes=5, registers=2)


def net() -> EmbeddingNet:
    return EmbeddingNet(ViT(CONFIG), mean=[0.5], std=[0.5], dim=4)


def rates(network: EmbeddingNet, layer_decay: float) -> dict[str, float]:
    groups = parameter_groups(network, None, CPU, learning_rate=1.0, weight_decay=0.1, layer_decay=layer_decay)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert found.keys() == set(names.values())
    assert sum(len(group["params"]) for group in groups) == len(names)
    return found


def test_the_rate_falls_by_the_layer_decay_from_block_to_block() -> None:
    found = rates(net(), 0.5)
    for name, share in {
        "projection.weight": 1.0,
        "backbone.norm.weight": 1.0,
        "backbone.head.weight": 1.0,
        "backbone.blocks.2.attn.qkv.weight": 0.5,
        "backbone.blocks.1.mlp.fc1.bias": 0.25,
        "backbone.blocks.0.norm1.weight": 0.125,
        "backbone.pos_embed": 0.0625,
        "backbone.cls_token": 0.0625,
        "backbone.reg_token": 0.0625,
    }.items():
        assert found[name] == pytest.approx(share), name
    assert {rate for name, rate in found.items() if "patch_embed" in name} == {0.0625}


def test_it_agrees_with_timms_groups() -> None:
    from timm.optim import param_groups_layer_decay

    peer = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=7)
    expected = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(peer, layer_decay=0.7)
        for parameter in group["params"]
    }
    theirs = {name: expected[id(parameter)] for name, parameter in peer.named_parameters()}
    config = ViTConfig((32, 32), 16, 3, width=192, depth=3, heads=3, num_classes=7)
    network = EmbeddingNet(ViT(config), mean=[0.5] * 3, std=[0.5] * 3)
    ours = {name.removeprefix("backbone."): rate for name, rate in rates(network, 0.7).items()}
    shared = {name for name in ours.keys() & theirs.keys() if not name.startswith("norm.")}  # timm: of the last block
    assert len(shared) >= 40
    assert {name: ours[name] for name in shared} == pytest.approx({name: theirs[name] for name in shared})


def test_without_layer_decay_all_have_the_whole_rate() -> None:
    assert set(rates(net(), 1.0).values()) == {1.0}


def test_the_parameters_of_the_loss_have_a_rate_of_their_own_and_no_decay() -> None:
    loss = losses.ProxyAnchorLoss(5, 16)
    groups = parameter_groups(net(), loss, CPU, learning_rate=0.1, weight_decay=0.1, loss_learning_rate=3.0)
    (own,) = [group for group in groups if group["of_loss"]]
    assert own["params"] == list(loss.parameters())
    assert (own["lr"], own["weight_decay"]) == (3.0, 0.0)


def test_a_rate_for_a_loss_without_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"TripletLoss.* has no parameters"):
        parameter_groups(net(), TripletLoss(), CPU, learning_rate=0.1, weight_decay=0.1, loss_learning_rate=3.0)


def test_layer_decay_needs_blocks() -> None:
    backbone = ForeignBackbone(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)), image_size=(8, 8), channels=1
    )
    network = EmbeddingNet(backbone, mean=[0.5], std=[0.5])
    with pytest.raises(ConfigError, match="counts the blocks"):
        parameter_groups(network, None, CPU, learning_rate=0.1, weight_decay=0.1, layer_decay=0.9)
