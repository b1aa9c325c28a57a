"""Near-duplicates and clusters, compared with plain loops over all pairs."""

import subprocess
import sys

import numpy as np
import pytest

from vitembed.errors import ConfigError
from vitembed.index import Index, clusters, duplicates
from vitembed.index.clusters import cluster, sample
from vitembed.index.duplicates import near_duplicates
from vitembed.index.exact import pair_scores
from vitembed.index.reading import RewrittenError

DIM = 8


def unit(rows, seed=0, dim=DIM):
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def around(centres, each, spread, seed=0):
    """Unit vectors in bunches, `each` around every centre; the bunch of a row is its number divided by `each`."""
    rows = np.repeat(centres, each, axis=0)
    rows = rows + spread * np.random.default_rng(seed).standard_normal(rows.shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def filled(path, ids, vectors):
    index = Index.create(path, vectors.shape[1])
    index.add(ids, vectors, [{"path": f"/pictures/{name}"} for name in ids])
    return index


def plain_groups(ids, vectors, score):
    """Connected components by repeated merging over all pairs, with the figures of each group."""
    scores = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    linked = scores >= score
    np.fill_diagonal(linked, False)
    label = list(range(len(ids)))
    for _ in ids:
        for i in range(len(ids)):
            for j in range(len(ids)):
                if linked[i, j]:
                    label[i] = label[j] = min(label[i], label[j])
    found = []
    for one in set(label):
        members = [i for i in range(len(ids)) if label[i] == one]
        if len(members) < 2:
            continue
        chosen = min(members, key=lambda i: (-linked[i].sum(), ids[i]))
        weakest = min(scores[i, j] for i in members for j in members if linked[i, j])
        found.append((ids[chosen], weakest, sorted((ids[i], scores[i, chosen]) for i in members)))
    return sorted(found, key=lambda group: (-len(group[2]), group[2][0][0]))


def as_tuples(found):
    return [(one.representative, one.weakest, [(hit.id, hit.score) for hit in one.members]) for one in found]


def assert_same_groups(found, expected):
    assert [one[0] for one in found] == [one[0] for one in expected]
    assert [[name for name, _ in one[2]] for one in found] == [[name for name, _ in one[2]] for one in expected]
    assert [one[1] for one in found] == pytest.approx([one[1] for one in expected], abs=1e-6)
    for one, other in zip(found, expected, strict=True):
        assert [score for _, score in one[2]] == pytest.approx([score for _, score in other[2]], abs=1e-6)


@pytest.mark.parametrize("score", [0.8, 0.9, 0.99])
def test_groups_are_the_connected_components_of_the_pairs_at_or_above_the_score(tmp_path, score):
    vectors = np.concatenate([around(unit(12, 1), 6, 0.12, seed=2), unit(40, 3)])
    ids = [f"ünï/{number:03}.jpg" for number in np.random.default_rng(4).permutation(len(vectors))]
    expected = plain_groups(ids, vectors, score)
    assert expected, "the oracle must have something to find"
    with filled(tmp_path / "x", ids, vectors) as index:
        assert_same_groups(as_tuples(near_duplicates(index, score)), expected)


def test_a_chain_of_alike_entries_is_one_group_though_its_ends_are_not_alike(tmp_path):
    angles = np.radians([0, 15, 30, 45, 170])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    with filled(tmp_path / "x", ["a", "b", "c", "d", "far"], vectors) as index:
        (group,) = near_duplicates(index, 0.95)
    assert group.representative == "b"  # b and c are linked to two others each
    assert [hit.id for hit in group.members] == ["a", "b", "c", "d"]
    assert group.weakest == pytest.approx(np.cos(np.radians(15)), abs=1e-6)
    assert [hit.score for hit in group.members] == pytest.approx(np.cos(np.radians([15, 0, 15, 30])), abs=1e-6)
    assert [hit.metadata for hit in group.members] == [{"path": f"/pictures/{name}"} for name in "abcd"]


def test_the_order_of_insertion_changes_nothing(tmp_path):
    vectors = np.concatenate([around(unit(8, 1), 5, 0.1, seed=2), unit(20, 3), unit(3, 3)])
    ids = [f"id{number:02}" for number in range(len(vectors))]
    answers = []
    for turn in range(3):
        order = np.random.default_rng(turn).permutation(len(ids))
        with filled(tmp_path / str(turn), [ids[n] for n in order], vectors[order]) as index:
            index.remove(["id00"])
            index.add(["id00"], vectors[:1], [{"path": "/pictures/id00"}])
            clustering = cluster(index, 6, seed=3)
            answers.append(
                (near_duplicates(index, 0.9), clustering.clusters, clustering.centres.tolist(), sample(index, 9, 1).ids)
            )
    assert answers[0][0]
    assert answers[0] == answers[1] == answers[2]


def test_entries_with_the_same_vector_belong_together_at_any_score(tmp_path):
    vectors = unit(200, 5, dim=64) * np.float32(0.9995)  # shorter than 1 within the tolerance: less than 1 like itself
    vectors[50:53] = vectors[7]
    with filled(tmp_path / "x", [f"{number:03}" for number in range(200)], vectors) as index:
        (group,) = near_duplicates(index, 1.0)
    assert [hit.id for hit in group.members] == ["007", "050", "051", "052"]
    assert (group.representative, group.weakest) == ("007", pytest.approx(0.9995**2, abs=1e-6))


@pytest.mark.parametrize(("rows", "others"), [(1, 1), (7, 9), (16, 64), (1_024, 4_096)])
def test_the_size_of_the_blocks_changes_nothing(tmp_path, monkeypatch, rows, others):
    vectors = np.concatenate([around(unit(3, 6), 14, 0.09, seed=7), unit(20, 8)])
    vectors[[50, 51]] = vectors[[3, 60]]
    ids = [f"{number:03}" for number in np.random.default_rng(1).permutation(len(vectors))]
    monkeypatch.setattr(duplicates, "_ROWS", rows)
    monkeypatch.setattr(duplicates, "_OTHERS", others)
    monkeypatch.setattr(duplicates, "_BATCH", rows)
    expected = plain_groups(ids, vectors, 0.9)
    with filled(tmp_path / "x", ids, vectors) as index:
        assert_same_groups(as_tuples(near_duplicates(index, 0.9)), expected)
        index.remove(ids[10:30])
        kept = [*range(10), *range(30, len(ids))]
        expected = plain_groups([ids[number] for number in kept], vectors[kept], 0.9)
        assert_same_groups(as_tuples(near_duplicates(index, 0.9)), expected)


def test_each_pair_is_scored_once(tmp_path, monkeypatch):
    scored = []

    def counting(vectors, rows, queries, owners):
        scored.append(len(rows))
        return pair_scores(vectors, rows, queries, owners)

    monkeypatch.setattr(duplicates, "pair_scores", counting)
    monkeypatch.setattr(duplicates, "_ROWS", 8)
    monkeypatch.setattr(duplicates, "_OTHERS", 16)
    with filled(tmp_path / "x", [f"{number:02}" for number in range(40)], unit(40)) as index:
        (group,) = near_duplicates(index, -1)
    assert len(group.members) == 40
    assert sum(scored) == 40 * 39 // 2 + 40  # and each member with the representative


def test_a_representative_is_linked_to_the_most_others_whatever_its_own_length(tmp_path):
    # Lengths within the tolerance: b is not even at the score with itself, and has a link as everyone has.
    angles = np.radians([0.0, 0.0, 0.001])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1.0009], [0.9993], [1.0009]]
    with filled(tmp_path / "x", ["z", "a", "y"], vectors.astype(np.float32)) as index:
        (group,) = near_duplicates(index, 0.99925)
    assert group.representative == "a"
    assert [hit.id for hit in group.members] == ["a", "y", "z"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_pair_at_the_very_score_is_linked_and_one_below_is_not(tmp_path, dtype):
    vectors = unit(30, 13)
    with Index.create(tmp_path / "x", DIM, dtype=dtype) as index:
        index.add([f"{number:02}" for number in range(30)], vectors)
        best, other = max(
            (hits[1].score, hits[1].id) for hits in index.search(np.stack([index.get(n).vector for n in index.ids()]))
        )
        assert [group.weakest for group in near_duplicates(index, best)] == [best]
        assert other in {hit.id for hit in near_duplicates(index, best)[0].members}
        assert near_duplicates(index, float(np.nextafter(best, 2))) == []


def test_what_is_removed_meanwhile_is_left_out_and_a_rewritten_index_is_told(tmp_path, monkeypatch):
    vectors = around(unit(2, 6), 3, 0.02)
    connect = duplicates._Links.connect
    with filled(tmp_path / "x", list("abcdef"), vectors) as index, Index.open(tmp_path / "x") as other:
        meanwhile = [lambda: other.remove(["a", "d", "e"]), other.compact]

        def changing(links, *pairs):
            meanwhile.pop(0)()
            connect(links, *pairs)

        monkeypatch.setattr(duplicates._Links, "connect", changing)
        (group,) = near_duplicates(index, 0.9)
        assert [hit.id for hit in group.members] == ["b", "c"]
        with pytest.raises(RewrittenError, match="begin again"):
            near_duplicates(index, 0.9)
        meanwhile.append(lambda: None)
        assert len(near_duplicates(index, 0.9)) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_an_index_of_nothing_or_one_entry_has_no_duplicates(tmp_path, count):
    with filled(tmp_path / "x", ["only"][:count], unit(count)) as index:
        assert near_duplicates(index, -1) == []


def test_everything_is_one_group_at_the_lowest_score(tmp_path):
    with filled(tmp_path / "x", ["b", "a", "c"], unit(3)) as index:
        (group,) = near_duplicates(index, -1)
    assert [hit.id for hit in group.members] == ["a", "b", "c"]
    assert group.representative == "a"  # all are linked to two others: the smallest id


@pytest.mark.parametrize("score", [1.01, -1.5, float("nan"), "high", True, None])
def test_a_score_that_is_no_cosine_is_refused(tmp_path, score):
    with filled(tmp_path / "x", ["a"], unit(1)) as index, pytest.raises(ConfigError, match="from -1 to 1"):
        near_duplicates(index, score)


def test_progress_counts_every_pair_once_and_is_shown_only_when_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(duplicates, "_ROWS", 3)
    monkeypatch.setattr(duplicates, "_OTHERS", 4)
    with filled(tmp_path / "x", [str(number) for number in range(11)], unit(10)[[*range(10), 3]]) as index:
        near_duplicates(index, progress=True)
        shown = capsys.readouterr().err
        assert "55.0/55.0" in shown  # of ten different vectors
        assert "100%" in shown
        near_duplicates(index)
        assert capsys.readouterr().err == ""
        cluster(index, progress=True)
        shown = capsys.readouterr().err
        assert "100%" in shown
        assert "16/16" in shown  # three starts for 2, 3, 4 and 5 clusters and three at the end, then the assignment
        cluster(index)
        assert capsys.readouterr().err == ""


# Clusters


def bunches(found):
    return {frozenset(int(hit.id) for hit in one.members) for one in found.clusters}


@pytest.mark.parametrize(("count", "clusters"), [(3, None), (7, None), (12, 12)])
def test_bunches_that_are_apart_are_the_clusters_and_their_number_is_found(tmp_path, count, clusters):
    vectors = around(unit(count, 1, dim=32), 15, 0.03, seed=2)
    with filled(tmp_path / "x", [str(number) for number in range(len(vectors))], vectors) as index:
        found = cluster(index, clusters)
    assert bunches(found) == {frozenset(range(start, start + 15)) for start in range(0, 15 * count, 15)}
    assert (found.silhouette is None) == (clusters is not None)


def test_the_silhouette_is_that_of_the_definition(tmp_path):
    vectors = around(unit(4, 1), 10, 0.2, seed=2)
    with filled(tmp_path / "x", [str(number) for number in range(40)], vectors) as index:
        found = cluster(index)
    label = {int(hit.id): number for number, one in enumerate(found.clusters) for hit in one.members}
    distance = 1 - vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    values = []
    for i in range(40):
        means = {
            number: np.mean([distance[i, j] for j in range(40) if label[j] == number and j != i])
            for number in set(label.values())
        }
        own = means.pop(label[i])
        values.append((min(means.values()) - own) / max(own, min(means.values())))
    assert found.silhouette == pytest.approx(np.mean(values), abs=1e-4)


def test_each_entry_is_in_one_cluster_its_nearest_and_the_medoid_is_nearest_to_the_centre(tmp_path):
    vectors = unit(300, 9)
    ids = [f"é{number}" for number in range(300)]
    with filled(tmp_path / "x", ids, vectors) as index:
        found = cluster(index, 12, seed=1)
    scores = vectors.astype(np.float64) @ found.centres.astype(np.float64).T
    assert np.linalg.norm(found.centres, axis=1) == pytest.approx(1, abs=1e-6)
    assert sorted(hit.id for one in found.clusters for hit in one.members) == sorted(ids)
    assert [len(one.members) for one in found.clusters] == sorted(
        (len(o.members) for o in found.clusters), reverse=True
    )
    for number, one in enumerate(found.clusters):
        rows = [int(hit.id[1:]) for hit in one.members]
        assert (scores[rows].argmax(axis=1) == number).all()
        assert [hit.score for hit in one.members] == pytest.approx(scores[rows, number], abs=1e-6)
        assert [hit.score for hit in one.members] == sorted((hit.score for hit in one.members), reverse=True)
        assert one.medoid == ids[max(rows, key=lambda row, number=number: scores[row, number])]
        assert one.members[0].metadata == {"path": f"/pictures/{one.medoid}"}


def test_centres_are_where_k_means_comes_to_rest(tmp_path):
    vectors = unit(200, 10)
    with filled(tmp_path / "x", [str(number) for number in range(200)], vectors) as index:
        found = cluster(index, 5)
    for centre, one in zip(found.centres, found.clusters, strict=True):
        mean = vectors[[int(hit.id) for hit in one.members]].astype(np.float64).sum(axis=0)
        assert centre == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


def test_the_seed_decides(tmp_path):
    with filled(tmp_path / "x", [str(number) for number in range(200)], unit(200, 11)) as index:
        first, again, other = cluster(index, 9, seed=1), cluster(index, 9, seed=1), cluster(index, 9, seed=2)
    assert first.clusters == again.clusters
    assert bunches(first) != bunches(other)


def test_centres_learned_from_a_part_serve_all(tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "LEARNED", 60)
    monkeypatch.setattr(clusters, "_JUDGED", 50)
    vectors = around(unit(5, 1, dim=32), 100, 0.03, seed=2)
    with filled(tmp_path / "x", [str(number) for number in range(500)], vectors) as index:
        found = cluster(index)
    assert bunches(found) == {frozenset(range(start, start + 100)) for start in range(0, 500, 100)}


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (2, [2])])
def test_fewer_than_three_entries_are_one_cluster_at_most(tmp_path, count, sizes):
    with filled(tmp_path / "x", ["a", "b"][:count], unit(2)[:count]) as index:
        found = cluster(index)
    assert [len(one.members) for one in found.clusters] == sizes
    assert found.centres.shape == (len(sizes), DIM)
    assert found.silhouette is None


def test_there_are_no_more_clusters_than_different_vectors(tmp_path):
    vectors = unit(2)[[0, 1, 0, 1, 0, 1]]
    with filled(tmp_path / "x", list("abcdef"), vectors) as index:
        assert [[hit.id for hit in one.members] for one in cluster(index, 6).clusters] == [list("ace"), list("bdf")]
        assert len(cluster(index).clusters) == 2


def test_all_entries_the_same_are_one_cluster(tmp_path):
    with filled(tmp_path / "x", list("abcd"), unit(1)[[0, 0, 0, 0]]) as index:
        (one,) = cluster(index).clusters
    assert [hit.id for hit in one.members] == list("abcd")


def test_opposite_vectors_in_one_cluster_leave_its_centre_defined(tmp_path):
    vector = unit(1)
    with filled(tmp_path / "x", ["a", "b"], np.concatenate([vector, -vector])) as index:
        found = cluster(index, 1)
    assert np.linalg.norm(found.centres[0]) == pytest.approx(1)
    assert [hit.score for hit in found.clusters[0].members] == pytest.approx([1, -1])


@pytest.mark.parametrize("clusters", [0, -1, 2.5, True, "two"])
def test_a_number_of_clusters_that_is_none_is_refused(tmp_path, clusters):
    with filled(tmp_path / "x", ["a", "b"], unit(2)) as index, pytest.raises(ConfigError, match="at least 1"):
        cluster(index, clusters)


def test_more_clusters_than_entries_and_a_negative_seed_are_refused(tmp_path):
    with filled(tmp_path / "x", ["a", "b"], unit(2)) as index:
        with pytest.raises(ConfigError, match="at most the number of entries, 2; got 3"):
            cluster(index, 3)
        with pytest.raises(ConfigError, match="seed must be"):
            cluster(index, 2, seed=-1)


# Samples


def test_a_sample_is_drawn_by_the_seed_without_repetition_and_in_order_of_the_ids(tmp_path):
    vectors = unit(50, 12)
    ids = [f"{number:02}" for number in np.random.default_rng(0).permutation(50)]
    with filled(tmp_path / "x", ids, vectors) as index:
        some, other, every = sample(index, 20, seed=1), sample(index, 20, seed=2), sample(index, 99)
        with pytest.raises(ConfigError, match="limit must be"):
            sample(index, 0)
    assert len(set(some.ids)) == 20
    assert some.ids == sorted(some.ids) != other.ids
    assert every.ids == sorted(ids)
    for found in (some, every):
        assert (found.vectors == vectors[[ids.index(name) for name in found.ids]]).all()
        assert found.metadata == [{"path": f"/pictures/{name}"} for name in found.ids]


def test_importing_the_modules_loads_neither_scikit_learn_nor_faiss():
    code = "import sys; from vitembed.index import clusters, duplicates; "
    code += "print(*{'sklearn', 'faiss', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
