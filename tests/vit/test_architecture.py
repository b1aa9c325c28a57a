"""The architecture as a value: what it counts, what it refuses, and its way through JSON."""

import dataclasses
import json
from collections.abc import Callable

import pytest

from vitembed.architecture import SIZES, ViTConfig, conv_stem
from vitembed.errors import ConfigError


def test_a_configuration_survives_json() -> None:
    config = ViTConfig(
        image_size=(16, 24),
        patch_size=8,
        channels=1,
        width=32,
        depth=3,
        heads=4,
        mlp_width=50,
        mlp="swiglu",
        stem=conv_stem(32, 8),
        registers=2,
        distilled=True,
        layer_scale=True,
        norm_pre=True,
        norm_eps=1e-5,
        merge=3,
        num_classes=3,
        head_width=8,
        drop_path=0.1,
    )
    default = ViTConfig()
    same = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) == getattr(default, f.name)]
    assert same == [], "every field must differ from its default here"
    assert ViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ViTConfig.from_dict({}) == default


@pytest.mark.parametrize(
    ("changes", "tokens", "positions"),
    [
        ({}, 1, 1),
        ({"distilled": True}, 2, 2),
        ({"registers": 4}, 5, 0),
        ({"registers": 4, "distilled": True}, 6, 0),
    ],
)
def test_the_prefix_counts_its_tokens_and_their_positions(changes: dict[str, int], tokens: int, positions: int) -> None:
    config = ViTConfig(image_size=(32, 64), **changes)  # type: ignore[arg-type]
    assert (config.prefix_tokens, config.prefix_positions) == (tokens, positions)
    assert (config.grid, config.patches) == ((2, 4), 8)


@pytest.mark.parametrize("size", SIZES)
def test_a_named_size_has_the_width_depth_and_heads_of_the_table(size: str) -> None:
    config = ViTConfig.named(f"{size}/16", image_size=(32, 48), channels=1, num_classes=7, drop_path=0.2)
    assert (config.width, config.depth, config.heads) == SIZES[size]
    assert config.width // config.heads in (32, 64, 80)
    rest = (config.image_size, config.patch_size, config.channels, config.num_classes, config.drop_path)
    assert rest == ((32, 48), 16, 1, 7, 0.2)
    assert ViTConfig.named(f"{size}/16", stem="conv").stem == conv_stem(SIZES[size][0], 16)


@pytest.mark.parametrize("patch", [2, 4, 8, 16, 32])
def test_a_conv_stem_multiplies_to_the_patch_and_ends_at_the_width(patch: int) -> None:
    stem = conv_stem(64, patch)
    product = 1
    for _, stride in stem:
        product *= stride
    assert product == patch
    assert stem[-1][0] == 64
    assert min(width for width, _ in stem) >= 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ViTConfig(image_size=(224, 225)), "multiples of the patch size 16"),
        (lambda: ViTConfig(image_size=(224, 0)), "positive multiples"),
        (lambda: ViTConfig(image_size=(224,)), "two positive multiples"),  # type: ignore[arg-type]
        (lambda: ViTConfig(image_size=(224.0, 224.0)), "multiples"),  # type: ignore[arg-type]
        (lambda: ViTConfig(width=100, heads=3), "multiple of heads"),
        (lambda: ViTConfig(depth=0), "depth"),
        (lambda: ViTConfig(heads=2.0), "heads must be a whole number"),  # type: ignore[arg-type]
        (lambda: ViTConfig(mlp_width=0), "mlp_width"),
        (lambda: ViTConfig(num_classes=-1), "num_classes"),
        (lambda: ViTConfig(registers=-1), "registers"),
        (lambda: ViTConfig(registers=1.5), "registers"),  # type: ignore[arg-type]
        (lambda: ViTConfig(merge=-3), "merge"),
        (lambda: ViTConfig(distilled="no"), "distilled must be true or false"),  # type: ignore[arg-type]
        (lambda: ViTConfig(mlp="relu"), "unknown MLP 'relu'"),  # type: ignore[arg-type]
        (lambda: ViTConfig(mlp="swiglu2"), "did you mean 'swiglu'"),  # type: ignore[arg-type]
        (lambda: ViTConfig(norm_eps=0.0), "norm_eps"),
        (lambda: ViTConfig(drop_path=1.0), "drop_path"),
        (lambda: ViTConfig(stem=((8, 2),)), "multiply to the patch size 16"),
        (lambda: ViTConfig.named("S16"), "such as 'S/16'"),
        (lambda: ViTConfig.named("T/16"), "did you mean 'Ti'"),
        (lambda: ViTConfig.named("S/16", stem="convs"), "did you mean 'conv'"),  # type: ignore[arg-type]
        (lambda: ViTConfig.from_dict({"dept": 3}), "did you mean 'depth'"),
        (lambda: ViTConfig.from_dict({"register": 3}), "did you mean 'registers'"),
        (lambda: conv_stem(32, 6), "2, 4, 8, 16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
