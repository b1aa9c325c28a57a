from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vitembed.errors import ConfigError, DataError
from vitembed.verify.pairs import Pairs


def save_images(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(root / name)


@pytest.fixture
def table(tmp_path):
    save_images(tmp_path, ["a.png", "sub/b.png", "ü, x.png"])

    def write(text, encoding="utf-8"):
        path = tmp_path / "pairs.csv"
        path.write_bytes(text.encode(encoding))
        return path

    return write


def test_a_table_is_read_relative_to_its_own_folder(table, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    absolute = tmp_path / "a.png"
    pairs = Pairs.from_csv(table(f'left,right,match\na.png,sub/b.png,1\n{absolute},"ü, x.png",0\n'))
    assert pairs.left == (tmp_path / "a.png", absolute)
    assert pairs.right == (tmp_path / "sub/b.png", tmp_path / "ü, x.png")
    assert pairs.is_match.tolist() == [True, False]
    assert len(pairs) == 2


def test_order_case_other_columns_blank_lines_and_a_byte_order_mark_are_taken(table):
    text = "Match,note, LEFT ,right\r\nYES,x,a.png,a.png\r\n\r\n no ,,a.png, sub/b.png\r\n"
    pairs = Pairs.from_csv(table(text, "utf-8-sig"))
    assert pairs.is_match.tolist() == [True, False]
    assert pairs.right[1].name == "b.png"


@pytest.mark.parametrize(
    ("word", "flag"),
    [("1", True), ("true", True), ("Yes", True), ("0", False), ("FALSE", False), ("no", False)],
)
def test_every_documented_word_for_a_match_is_read(table, word, flag):
    assert Pairs.from_csv(table(f"left,right,match\na.png,a.png,{word}")).is_match.tolist() == [flag]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected a header with the columns left, right and match; got ''"),
        ("a,b,label\n", "line 1: expected a header .* got 'a,b,label'"),
        ("left,right,match,left\n", "line 1: expected a header"),
        ("left,right,match\n", "expected pairs below the header; got none"),
        ("left,right,match\na.png,a.png,1\na.png,a.png,maybe\n", "line 3: expected match to be .*; got 'maybe'"),
        ("left,right,match\na.png,a.png\n", "line 2: expected 3 cells; got 2"),
        ("left,right,match\na.png,,1\n", "line 2: expected a path; got an empty cell"),
        ("left,right,match\n\na.png,gone.png,1\n", r"line 3: expected an image at .*gone\.png; there is no such file"),
        ("left,right,match\na.png,sub,1\n", "line 2: expected an image at .*sub; there is no such file"),
        ('left,right,match\n"a.png,a.png,1\n', "expected a CSV file of pairs in UTF-8; unexpected end of data"),
    ],
)
def test_a_bad_table_names_the_file_and_what_was_expected(table, text, message):
    with pytest.raises(DataError, match=rf"pairs\.csv(, |: ){message}") as caught:
        Pairs.from_csv(table(text))
    assert "\n" not in str(caught.value)


def test_a_table_that_is_missing_a_folder_or_not_text_is_one_clear_error(table, tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: expected a CSV file of pairs; No such file"):
        Pairs.from_csv(tmp_path / "none.csv")
    with pytest.raises(DataError, match="Is a directory"):
        Pairs.from_csv(tmp_path)
    with pytest.raises(DataError, match="in UTF-8"):
        Pairs.from_csv(table("left,right,match\nü,ü,1\n", "latin-1"))


def test_a_small_folder_gives_every_pair_once(tmp_path):
    save_images(tmp_path, ["x/1.png", "x/2.png", "x/3.png", "y/1.png", "y/2.png", "z/deep/1.png"])
    pairs = Pairs.from_folder(tmp_path)
    found = Counter(frozenset(pair) for pair in zip(pairs.left, pairs.right, strict=True))
    assert set(found.values()) == {1}
    assert len(found) == 6 * 5 / 2
    assert pairs.is_match.sum() == 3 + 1
    for left, right, match in zip(pairs.left, pairs.right, pairs.is_match, strict=True):
        assert (left.parent == right.parent) == match


def test_identity_is_the_whole_folder_even_where_folders_nest(tmp_path):
    save_images(tmp_path, ["x/1.png", "x/m/1.png", "x/z.png", "y/m/1.png", "y/m/2.png"])
    pairs = Pairs.from_folder(tmp_path)
    matching = {(a.relative_to(tmp_path).as_posix(), b.relative_to(tmp_path).as_posix())
                for a, b, m in zip(pairs.left, pairs.right, pairs.is_match, strict=True) if m}  # fmt: skip
    assert matching == {("x/1.png", "x/z.png"), ("y/m/1.png", "y/m/2.png")}


def test_a_cap_holds_draws_without_repetition_and_repeats_with_its_seed(tmp_path):
    save_images(tmp_path, [f"{name}/{i}.png" for name in "abcd" for i in range(8)])
    pairs = Pairs.from_folder(tmp_path, max_pairs=60, seed=3)
    listed = list(zip(pairs.left, pairs.right, strict=True))
    assert len(set(listed)) == len(listed) == 60
    assert pairs.is_match.sum() == 30
    for (left, right), match in zip(listed, pairs.is_match, strict=True):
        assert left != right
        assert (left.parent == right.parent) == match
    again = Pairs.from_folder(tmp_path, max_pairs=60, seed=3)
    assert (again.left, again.right) == (pairs.left, pairs.right)
    assert Pairs.from_folder(tmp_path, max_pairs=60, seed=4).right != pairs.right
    assert len({p.parent for p in pairs.left + pairs.right}) == 4  # no identity is passed over


def test_drawn_pairs_are_uniform(tmp_path):
    save_images(tmp_path, ["a/1.png", "b/1.png", "b/2.png", "b/3.png", "c/1.png", "c/2.png"])
    drawn = Counter()
    for seed in range(1100):
        pairs = Pairs.from_folder(tmp_path, max_pairs=2, seed=seed)
        drawn[pairs.left[1], pairs.right[1]] += 1
    assert len(drawn) == 1 * 3 + 1 * 2 + 3 * 2
    assert all(60 < count < 145 for count in drawn.values())  # 100 expected, over 4 standard deviations


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x/1.png", "x/2.png"], "got 2 images of 1 identity$"),
        (["x/1.png", "y/1.png"], "got 2 images of 2 identities$"),
        (["x/1.png", "x/2.png", "loose.png"], r"loose\.png lies in no class; expected .*/CLASS/IMAGE"),
        (["x/genuine/1.png", "x/forged/1.png"], "got 1 images of 1 identity$"),
    ],
)
def test_an_unusable_folder_is_one_clear_error(tmp_path, names, message):
    save_images(tmp_path, names)
    with pytest.raises(DataError, match=message):
        Pairs.from_folder(tmp_path)


def test_a_missing_or_empty_folder_is_one_clear_error(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=r"holds no image|does not exist"):
            Pairs.from_folder(folder)
    (tmp_path / "a").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "a" / "1.png")
    with pytest.raises(ConfigError, match="max_pairs must be at least 2; got 1"):
        Pairs.from_folder(tmp_path, max_pairs=1)


def test_pairs_of_any_images_are_checked_and_cannot_be_changed():
    flags = np.array([True, False])
    pairs = Pairs(["a", "b"], [np.zeros((2, 2)), Image.new("L", (2, 2))], flags)
    flags[0] = False
    assert pairs.is_match.tolist() == [True, False]
    with pytest.raises(ValueError, match="read-only"):
        pairs.is_match[0] = False
    with pytest.raises(DataError, match=r"one length; got 1, 2 and \(2,\)"):
        Pairs(("a",), ("b", "c"), np.array([True, False]))
    with pytest.raises(DataError, match="must hold booleans; got int64"):
        Pairs(("a",), ("b",), np.array([1]))
    with pytest.raises(DataError, match="at least one pair"):
        Pairs((), (), np.array([], dtype=bool))


# Forgeries

SIGNATURES = [
    *(f"{writer}/genuine/{number}.png" for writer in ("ann", "bob", "cy") for number in range(4)),
    *(f"ann/forged/{number}.png" for number in range(3)),
    "bob/forged/0.png",
]


def described(pairs, root):
    """Return what a plain reader would say of each pair: its images, and genuine, random or skilled."""
    kinds = [
        "genuine" if match else "skilled" if forged else "random"
        for match, forged in zip(pairs.is_match, pairs.skilled, strict=True)
    ]
    sides = ([path.relative_to(root).as_posix() for path in side] for side in (pairs.left, pairs.right))
    return set(zip(*sides, kinds, strict=True))


def listed(names):
    """List all pairs by hand."""
    found = set()
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            (writer, kind, _), (of, other_kind, _) = one.split("/"), other.split("/")
            if kind == other_kind == "genuine":
                found.add((one, other, "genuine" if writer == of else "random"))
            elif kind == "genuine" and writer == of:
                found.add((one, other, "skilled"))
    return found


@pytest.mark.parametrize("read", [Pairs.from_folder, Pairs.from_signatures])
def test_forgeries_are_paired_with_whom_they_imitate_and_with_nobody_else(tmp_path, read):
    save_images(tmp_path, SIGNATURES)
    pairs = read(tmp_path)
    assert described(pairs, tmp_path) == listed(SIGNATURES)
    assert len(pairs) == len(listed(SIGNATURES))
    whom = {"ann": 0, "bob": 1, "cy": 2}
    for left, right, numbers in zip(pairs.left, pairs.right, pairs.identities.tolist(), strict=True):
        assert numbers == [whom[left.parent.parent.name], whom[right.parent.parent.name]]


def test_of_many_pairs_half_match_and_half_of_the_others_are_skilled(tmp_path):
    save_images(tmp_path, SIGNATURES)
    pairs = Pairs.from_signatures(tmp_path, max_pairs=16)
    assert (int(pairs.is_match.sum()), int(pairs.skilled.sum()), len(pairs)) == (8, 4, 16)
    assert described(pairs, tmp_path) < listed(SIGNATURES)
    assert described(Pairs.from_signatures(tmp_path, max_pairs=16, seed=1), tmp_path) != described(pairs, tmp_path)


def test_only_the_writers_asked_for_are_paired(tmp_path):
    save_images(tmp_path, SIGNATURES)
    pairs = Pairs.from_signatures(tmp_path, ["ann", "cy"])
    assert described(pairs, tmp_path) == listed([name for name in SIGNATURES if "bob" not in name])
    with pytest.raises(DataError, match="has no writer 'dan'; it has ann, bob, cy"):
        Pairs.from_signatures(tmp_path, ["ann", "dan"])


def test_images_elsewhere_are_no_signatures(tmp_path):
    save_images(tmp_path, [*SIGNATURES, "dan/1.png"])
    with pytest.raises(DataError, match=r"dan/1\.png lies in no .*WRITER/genuine"):
        Pairs.from_signatures(tmp_path)


def test_labels_may_be_numbers_with_minus_one_for_genuine_images():
    images = [np.zeros((2, 2), np.uint8) for _ in range(5)]
    pairs = Pairs.from_labels(images, np.array([7, 7, 3, 8, 9]), np.array([-1, -1, -1, 7, 3]))
    found = {
        (images_of(images, left), images_of(images, right), bool(match), bool(forged))
        for left, right, match, forged in zip(pairs.left, pairs.right, pairs.is_match, pairs.skilled, strict=True)
    }
    assert found == {
        (0, 1, True, False), (2, 0, False, False), (2, 1, False, False),
        (0, 3, False, True), (1, 3, False, True), (2, 4, False, True),
    }  # fmt: skip
    with pytest.raises(DataError, match="image 1 imitates 9, of whom there is no genuine image"):
        Pairs.from_labels(images[:2], [1, 2], [None, 9])
    with pytest.raises(DataError, match="expected forgery_of for each of the 2 images; got 1"):
        Pairs.from_labels(images[:2], [1, 2], [None])


def images_of(images, one):
    """Return the number of an image that lies in memory."""
    return next(number for number, image in enumerate(images) if image is one)


def test_the_kind_of_a_pair_is_read_from_a_table(table):
    text = "kind,left,right,match\nGenuine,a.png,a.png,1\nskilled,a.png,sub/b.png,0\nrandom,a.png,sub/b.png,no\n"
    pairs = Pairs.from_csv(table(text))
    assert pairs.is_match.tolist() == [True, False, False]
    assert pairs.skilled.tolist() == [False, True, False]
    assert Pairs.from_csv(table("left,right,match\na.png,a.png,1\n")).skilled is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.png,a.png,1,skilled", "line 2: the kind of a pair that matches must be genuine; got 'skilled'"),
        ("a.png,a.png,0,forged", "line 2: the kind of one that does not match must be random or skilled; got 'forged'"),
        ("a.png,a.png,0,", "line 2: the kind of one that does not match must be random or skilled; got ''"),
    ],
)
def test_a_kind_that_contradicts_is_named(table, row, message):
    with pytest.raises(DataError, match=message):
        Pairs.from_csv(table(f"left,right,match,kind\n{row}\n"))


def test_skilled_must_fit_and_match_nothing():
    images = [np.zeros((2, 2), np.uint8)] * 2
    with pytest.raises(DataError, match="skilled must hold 2 booleans"):
        Pairs(images, images, np.array([True, False]), skilled=np.array([False]))
    with pytest.raises(DataError, match="skilled must hold 2 booleans"):
        Pairs(images, images, np.array([True, False]), skilled=np.array([0, 1]))
    with pytest.raises(DataError, match="pair 0 is called both"):
        Pairs(images, images, np.array([True, False]), skilled=np.array([True, False]))
    pairs = Pairs(images, images, np.array([True, False]), skilled=np.array([False, True]))
    assert not pairs.skilled.flags.writeable


def test_one_pair_with_both_labels_is_refused_and_one_file_twice_is_counted(table):
    rows = "left,right,match\na.png,sub/b.png,1\na.png,a.png,1\n"
    assert Pairs.from_csv(table(rows)).one_sided == 1
    with pytest.raises(DataError, match=r"line 4: sub/b\.png and a\.png match in one line and not in another"):
        Pairs.from_csv(table(rows + "sub/b.png,a.png,0\n"))
    image = np.zeros((2, 2), np.uint8)
    assert Pairs([image], [image], np.array([True])).one_sided == 0


def test_the_layout_of_signatures_is_known_in_any_case_and_one_writer_alone_is_refused(tmp_path):
    save_images(tmp_path, [name.replace("genuine", "Genuine").replace("forged", "FORGED") for name in SIGNATURES])
    assert int(Pairs.from_folder(tmp_path).skilled.sum()) == 4 * 4
    with pytest.raises(DataError, match="is the folder of one writer; name the folder above it"):
        Pairs.from_folder(tmp_path / "ann")
