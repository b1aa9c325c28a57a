"""What is done to tokens between the layers: positions resampled, patches dropped, tokens merged."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from vitembed.errors import ConfigError
from vitembed.vit import ViT, ViTConfig
from vitembed.vit.tokens import Merged, drop_patches, merge, resample_positions

GRIDS = [((2, 3), (4, 6)), ((7, 7), (3, 5)), ((4, 4), (4, 4)), ((5, 2), (2, 5)), ((14, 14), (16, 16)), ((1, 1), (3, 2))]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Positions.


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(("before", "after"), GRIDS)
def test_resampled_positions_equal_timms(before: tuple[int, int], after: tuple[int, int], prefix: int) -> None:
    positions = draw(1, prefix + before[0] * before[1], 8)
    ours = resample_positions(positions, before, after, prefix=prefix)
    theirs = resample_abs_pos_embed(positions, after, before, num_prefix_tokens=prefix)
    assert ours.shape == (1, prefix + after[0] * after[1], 8)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(ours[:, :prefix], positions[:, :prefix])


def test_resampled_positions_keep_their_type() -> None:
    positions = draw(1, 7, 8).bfloat16()
    assert resample_positions(positions, (2, 3), (3, 3), prefix=1).dtype == torch.bfloat16


# Patch dropout.


@pytest.mark.parametrize(("share", "kept"), [(0.0, 10), (0.25, 8), (0.5, 5), (0.89, 1), (0.999, 1)])
def test_dropping_keeps_the_prefix_and_the_order_of_what_stays(share: float, kept: int) -> None:
    torch.manual_seed(0)
    tokens = torch.arange(12.0).view(1, 12, 1).expand(50, -1, 3)
    left = drop_patches(tokens, share, prefix=2)
    assert left.shape == (50, 2 + kept, 3)
    assert torch.equal(left[:, :2], tokens[:, :2])
    assert (left.diff(dim=1) > 0).all()
    assert (left == left[:, :, :1]).all()


def test_every_patch_is_dropped_as_often_and_each_image_by_itself() -> None:
    torch.manual_seed(0)
    tokens = torch.arange(9.0).view(1, 9, 1).expand(4000, -1, 1)
    left = drop_patches(tokens, 0.5, prefix=1)[:, 1:, 0].long()
    counts = torch.bincount(left.flatten(), minlength=9)[1:]
    assert (counts - 2000).abs().max() < 150  # five standard deviations
    assert len(torch.unique(left, dim=0)) == 70  # all the ways to choose 4 of 8


# Token merging.


def merged_as_in_the_paper(state: Merged, keys: Tensor, count: int, prefix: int) -> tuple[list[Tensor], list[float]]:
    """Return the tokens and sizes of one image after bipartite soft matching, one step after the other."""
    tokens, sizes = list(state.tokens[0]), state.sizes[0].tolist()
    patches = range(prefix, len(tokens))
    first, second = list(patches)[::2], list(patches)[1::2]
    edges = []
    for a in first:
        similarity = [torch.cosine_similarity(keys[0, a], keys[0, b], dim=0).item() for b in second]
        best = max(range(len(second)), key=lambda i: similarity[i])
        edges.append((similarity[best], a, second[best]))
    accepted = sorted(edges, reverse=True)[:count]
    for b in second:
        group = [(sizes[b], tokens[b])] + [(sizes[a], tokens[a]) for _, a, target in accepted if target == b]
        total = sum(size for size, _ in group)
        tokens[b] = sum((size * token for size, token in group), torch.zeros_like(tokens[b])) / total
        sizes[b] = total
    gone = {a for _, a, _ in accepted}
    order = [*range(prefix), *(a for a in first if a not in gone), *second]
    return [tokens[i] for i in order], [sizes[i] for i in order]


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("patches", [3, 5, 8, 13])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_merging_does_what_the_paper_writes(patches: int, count: int, prefix: int) -> None:
    state = Merged.start(draw(1, prefix + patches, 6), prefix=prefix)
    for step in range(2):  # the second time with sizes of more than one
        keys = draw(1, state.tokens.shape[1], 5, seed=step + 1)
        allowed = min(count, (state.tokens.shape[1] - prefix) // 2)
        tokens, sizes = merged_as_in_the_paper(state, keys, allowed, prefix)
        state = merge(state, keys, count, prefix=prefix)
        torch.testing.assert_close(state.tokens[0], torch.stack(tokens), rtol=0, atol=1e-6)
        torch.testing.assert_close(state.sizes[0], torch.tensor(sizes))


@settings(deadline=None, max_examples=60)
@given(
    patches=st.integers(1, 20),
    prefix=st.integers(0, 3),
    counts=st.lists(st.integers(0, 12), max_size=5),
    seed=st.integers(0, 10**6),
)
def test_a_token_is_the_mean_of_the_patches_that_live_in_it(
    patches: int, prefix: int, counts: list[int], seed: int
) -> None:
    tokens = draw(3, prefix + patches, 4, seed=seed)
    state = Merged.start(tokens, prefix=prefix)
    for step, count in enumerate(counts):
        before = state.tokens.shape[1]
        state = merge(state, draw(3, before, 5, seed=seed + step + 1), count, prefix=prefix)
        assert state.tokens.shape[1] == before - min(count, (before - prefix) // 2)
    assert torch.equal(state.tokens[:, :prefix], tokens[:, :prefix])
    assert (state.sizes[:, :prefix] == 1).all()
    torch.testing.assert_close(state.sizes[:, prefix:].sum(1), torch.full((3,), float(patches)))
    for image in range(3):
        for place in range(prefix, state.tokens.shape[1]):
            lodgers = (state.homes[image] == place).nonzero()[:, 0]
            assert len(lodgers) == state.sizes[image, place]
            mean = tokens[image, prefix + lodgers].mean(dim=0)
            torch.testing.assert_close(state.tokens[image, place], mean, rtol=0, atol=1e-5)
            assert torch.equal(state.unmerged[image, lodgers[0]], state.tokens[image, place])


def test_the_most_alike_are_merged_first() -> None:
    tokens = draw(1, 9, 4)
    keys = draw(1, 9, 5)
    keys[0, 5] = 3 * keys[0, 4]  # patches 3 and 4: one of each set, of one direction
    state = merge(Merged.start(tokens, prefix=1), keys, 1, prefix=1)
    home = state.homes[0]
    assert home[3] == home[4]
    assert len(home.unique()) == 7


def network(**changes: object) -> ViT:
    config = ViTConfig((16, 24), 4, 3, 32, 2, 4)
    torch.manual_seed(0)
    vit = ViT(dataclasses.replace(config, **changes)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return vit


def merging(vit: ViT, count: int) -> ViT:
    other = ViT(dataclasses.replace(vit.config, merge=count)).eval()
    other.load_state_dict(vit.state_dict())
    return other


KINDS = [{}, {"registers": 2, "layer_scale": True}, {"distilled": True, "num_classes": 3}, {"norm_pre": True}]


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("pairs", [1, 3, 12])
def test_equal_patches_without_a_place_are_merged_without_any_loss(pairs: int, changes: dict[str, object]) -> None:
    # Proportional attention is exact for tokens that are equal: n of them count n times.
    vit = network(**changes)
    images = draw(2, 3, 16, 24)
    tiles = images.unfold(2, 4, 4).unfold(3, 4, 4)  # a view: (B, C, 4 rows, 6 columns, 4, 4)
    for pair in range(pairs):
        row, column = divmod(2 * pair, 6)
        tiles[:, :, row, column + 1] = tiles[:, :, row, column]
    with torch.no_grad():
        exact = vit(images, patches=True, positions=False)
        for wanted in (False, True):
            merged = merging(vit, pairs)(images, patches=wanted, positions=False)
            torch.testing.assert_close(merged.cls, exact.cls, rtol=0, atol=1e-5)
            if exact.logits is not None:
                torch.testing.assert_close(merged.logits, exact.logits, rtol=0, atol=1e-5)
        assert merged.patches is not None
        torch.testing.assert_close(merged.patches, exact.patches, rtol=0, atol=1e-5)
        one_more = merging(vit, pairs - 1)(images, positions=False).cls
        assert torch.allclose(one_more, exact.cls, rtol=0, atol=1e-5)  # fewer than there are is no loss, either


def test_unequal_patches_are_merged_with_a_loss() -> None:
    vit, images = network(), draw(2, 3, 16, 24)
    with torch.no_grad():
        assert (merging(vit, 5)(images).cls - vit(images).cls).abs().max() > 1e-3


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("count", [1, 5, 1000])
def test_with_and_without_patches_the_merged_cls_is_the_same(count: int, changes: dict[str, object]) -> None:
    vit = merging(network(depth=4, **changes), count)
    with torch.no_grad():
        short, whole = vit(draw(2, 3, 16, 24)), vit(draw(2, 3, 16, 24), patches=True)
    torch.testing.assert_close(short.cls, whole.cls, rtol=0, atol=1e-5)
    assert whole.patches is not None
    assert whole.patches.shape == (2, 24, 32)
    kept = {1: 24 - 3, 5: 24 - 15, 1000: 3}[count]  # 24, 12, 6, 3: each of the blocks but the last halves at most
    assert [len(image.unique(dim=0)) for image in whole.patches] == [kept, kept]


def test_images_are_merged_each_by_itself() -> None:
    vit, images = merging(network(depth=3), 4), draw(5, 3, 16, 24)
    with torch.no_grad():
        together = vit(images).cls
        alone = torch.cat([vit(image[None]).cls for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_merging_none_is_the_exact_network_to_the_bit() -> None:
    vit, images = network(), draw(2, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(merging(vit, 0)(images).cls, vit(images).cls)


def test_training_does_not_merge() -> None:
    vit, images = network(depth=3), draw(2, 3, 16, 24)
    assert torch.equal(merging(vit, 4).train()(images).cls, vit.train()(images).cls)


def test_merging_passes_gradients_and_lower_precision() -> None:
    vit, images = merging(network(depth=3), 4), draw(2, 3, 16, 24)
    out = vit(images)
    out.cls.sum().backward()
    assert vit.patch_embed.proj.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        coarse = vit(images, patches=True).cls
    assert torch.cosine_similarity(coarse.float(), out.cls).min() > 0.9


def test_attentions_of_a_merging_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="replace merge by 0"):
        merging(network(), 2)(draw(1, 3, 16, 24), attentions=True)
