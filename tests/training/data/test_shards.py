"""Tar shards: samples and labels as webdataset groups them, images read at random, and shards that are damaged."""

import gc
import io
import json
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitembed.errors import DataError, ImageError
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.lazy import LazyImages
from vitembed.training.data.shards import from_shards, is_shards
from vitembed.training.data.sources import load_source


def picture(level: int, kind: str = "PNG", **more: object) -> bytes:
    file = io.BytesIO()
    Image.new("L", (6, 4), level).save(file, kind, **more)
    return file.getvalue()


def write(path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]], **more: int) -> Path:
    with tarfile.open(path, "w", **more) as tar:  # type: ignore[call-overload]
        for name, data in members.items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def level(dataset: ImageDataset, position: int) -> int:
    """Return the grey level of an image that `picture` made, which says which one it is."""
    image = dataset.images[position]
    assert isinstance(image, Image.Image)
    return int(np.asarray(image.convert("L"))[0, 0])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Write three shards of four samples: image i has the grey level i and the class i % 3."""
    for shard in range(3):
        members = {}
        for i in range(4 * shard, 4 * shard + 4):
            members |= {f"{i:04d}.png": picture(i), f"{i:04d}.cls": str(i % 3).encode()}
        write(tmp_path / f"train-{shard:06d}.tar", members)
    return tmp_path


@pytest.mark.parametrize(
    "pattern", ["train-{000000..000002}.tar", "train-*.tar", "train-00000{0,1,2}.tar", "t*{0..2}.tar"]
)
def test_every_way_to_name_the_shards_gives_the_same_images(shards: Path, pattern: str) -> None:
    dataset = from_shards(str(shards / pattern))
    assert [level(dataset, i) for i in range(12)] == list(range(12))
    assert [dataset.classes[label] for label in dataset.labels] == [str(i % 3) for i in range(12)]
    assert dataset.is_validation is None


def test_a_list_of_shards_keeps_its_order(shards: Path) -> None:
    dataset = from_shards([shards / "train-000002.tar", str(shards / "train-{000000..000001}.tar")])
    assert [level(dataset, i) for i in range(12)] == [8, 9, 10, 11, *range(8)]
    assert len(from_shards(shards / "train-000001.tar")) == 4


def test_a_shard_is_never_read_twice_under_two_names(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards)
    shard, link = shards / "train-000000.tar", shards / "link.tar"
    link.symlink_to(shard)
    for other in (shard, link, "train-000000.tar", f"{shards.parent}/{shards.name}/../{shards.name}/train-*0.tar"):
        with pytest.raises(DataError, match=r"the shard .*train-000000\.tar .*is named twice") as caught:
            from_shards([shard, other])
        assert (f"(also as {other})" in str(caught.value)) == (other in (link, "train-000000.tar"))
    assert len(from_shards([link, "train-000001.tar"])) == 8


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("0.json", b"[" * 100_000, "recursion"),
        ("0.json", b'{"label": ' + b"9" * 5000 + b"}", "4300 digits"),
        ("0.cls", b"9" * 5000, "4300 digits"),
    ],
)
def test_a_label_of_absurd_size_is_refused_with_its_member(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    write(tmp_path / "a.tar", {"0.png": picture(0), name: data})
    with pytest.raises(DataError, match=rf"a\.tar: {name} holds no label: .*{words}"):
        from_shards(tmp_path / "a.tar")


def test_a_name_too_long_for_a_file_is_an_error_of_one_line_or_a_pattern(shards: Path) -> None:
    with pytest.raises(DataError, match="there is no shard xxx"):
        load_source("x" * 5000 + ".tar")
    with pytest.raises(DataError, match=r"^x{60}\.\.\. cannot be opened: File name too long$"):
        load_source("x" * 5000)
    (shards / "more").mkdir()
    for number in range(400):
        (shards / "more" / f"{number:012d}.tar").symlink_to(shards / "train-000001.tar")
    names = ",".join(f"{number:012d}" for number in range(400))
    with pytest.raises(DataError, match="is named twice"):  # the pattern was understood: all are links to one shard
        load_source(f"{shards}/more/{{{names}}}.tar")


def test_images_are_read_at_random_and_from_the_end(shards: Path) -> None:
    dataset = from_shards(str(shards / "*.tar"))
    order = np.random.default_rng(0).integers(-12, 12, size=40)
    assert [level(dataset, i) for i in order] == [i % 12 for i in order]
    with pytest.raises(IndexError):
        level(dataset, 12)


def test_a_part_of_the_images_is_of_the_same_kind(shards: Path) -> None:
    images = from_shards(str(shards / "*.tar")).images
    assert isinstance(images, LazyImages)
    part = images.take([11, 0, 5, 3]).take([2, 0])
    assert isinstance(part, LazyImages)
    assert [int(np.asarray(image)[0, 0]) for image in part] == [5, 11]
    assert len(images.take([])) == 0


def test_labels_are_read_from_cls_json_and_txt(tmp_path: Path) -> None:
    members = {
        "a.jpg": picture(0, "JPEG"),
        "a.cls": b"007\n",
        "b.PNG": picture(1),
        "b.json": json.dumps({"label": "grün", "cls": 3}).encode(),
        "c.webp": picture(2, "WEBP"),
        "c.json": b'{"cls": 7}',
        "d.ppm": picture(3, "PPM"),
        "d.txt": "\ufeffgrün \n".encode(),
        "e.seg.png": picture(9),  # of another kind: its extension is seg.png
        "e.png": picture(4),
        "e.txt": b"a caption",
        "e.cls": b"red",
    }
    dataset = from_shards(write(tmp_path / "a.tar", members))
    assert [dataset.classes[label] for label in dataset.labels] == ["7", "grün", "7", "grün", "red"]
    assert [level(dataset, i) for i in range(5)] == [0, 1, 2, 3, 4]


def test_the_folder_belongs_to_the_key_and_what_has_no_key_is_left_alone(tmp_path: Path) -> None:
    members = {}
    for folder in ("v1.0/cats", "v1.0/dogs", "."):
        members |= {f"{folder}/1.png": picture(len(members)), f"{folder}/1.cls": folder.encode()}
    members |= {"README": b"no sample", "v1.0/._1.png": b"what a Mac adds"}
    dataset = from_shards(write(tmp_path / "a.tar", members))
    assert [dataset.classes[label] for label in dataset.labels] == ["v1.0/cats", "v1.0/dogs", "."]
    assert [level(dataset, i) for i in range(3)] == [0, 2, 4]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read_and_long_names_are_named(tmp_path: Path, kind: int) -> None:
    folder = "/".join(["folder" * 5] * 4)  # 123 characters: more than the plain field of a header holds
    names = [f"{folder}/{'ü' * 40 if kind != tarfile.USTAR_FORMAT else 'u'}{i}" for i in range(3)]
    members = [
        part for i, name in enumerate(names) for part in [(f"{name}.png", picture(i)), (f"{name}.cls", b"%d" % i)]
    ]
    members[4] = (members[4][0], b"no image")
    dataset = from_shards(write(tmp_path / "a.tar", members, format=kind))
    assert [level(dataset, i) for i in range(2)] == [0, 1]
    with pytest.raises(ImageError) as error:
        level(dataset, 2)
    assert error.value.source == f"{tmp_path / 'a.tar'}:{names[2]}.png"


def test_images_are_decoded_by_our_rules(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    members = {"a.jpg": picture(0, "JPEG", exif=turned), "a.cls": b"0", "b.png": picture(0), "b.cls": b"1"}
    dataset = from_shards(write(tmp_path / "a.tar", members))
    assert [image.size for image in dataset.images] == [(4, 6), (6, 4)]  # type: ignore[union-attr]


def test_agrees_with_unpacking_the_shards_into_files(shards: Path) -> None:
    dataset = from_shards(str(shards / "*.tar"))
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(shards / "files", filter="data")
    for position, path in enumerate(sorted((shards / "files").glob("*.png"))):
        assert level(dataset, position) == np.asarray(Image.open(path))[0, 0]
        assert dataset.classes[dataset.labels[position]] == path.with_suffix(".cls").read_text()


class Levels(torch.utils.data.Dataset[int]):
    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> int:
        return level(self.dataset, position)


def test_forked_workers_read_through_what_the_parent_has_opened(shards: Path) -> None:
    dataset = from_shards(str(shards / "*.tar"))
    assert level(dataset, 3) == 3  # opens a shard before the fork
    loader = torch.utils.data.DataLoader(Levels(dataset), batch_size=2, num_workers=2, multiprocessing_context="fork")
    assert torch.cat(list(loader)).tolist() == list(range(12))
    assert level(dataset, 3) == 3


def test_a_copy_in_another_process_opens_the_shards_by_itself(shards: Path) -> None:
    dataset = from_shards(str(shards / "*.tar"))
    assert level(dataset, 5) == 5
    copy = pickle.loads(pickle.dumps(dataset))
    (shards / "train-000001.tar").unlink()
    assert level(dataset, 5) == 5  # is open still
    assert level(copy, 0) == 0
    with pytest.raises(ImageError, match=r"train-000001\.tar: image at byte \d+: cannot be read: No such file"):
        level(copy, 5)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(level, (dataset, 11)) == 11


def test_more_shards_than_may_be_open_leave_no_descriptor_behind(tmp_path: Path) -> None:
    for i in range(70):
        write(tmp_path / f"{i:03d}.tar", {"a.png": picture(i), "a.cls": b"%d" % (i % 2)})
    before = open_files()
    dataset = from_shards(str(tmp_path / "{000..069}.tar"))
    assert [level(dataset, i) for i in [*range(70), *range(70)]] == [*range(70), *range(70)]
    assert open_files() - before == 64
    del dataset
    assert open_files() == before


def open_files() -> int:
    """Return how many descriptors of this process are open, but for those that are garbage."""
    gc.collect()
    return sum(is_open(number) for number in range(1000))


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def test_memory_of_an_image_is_its_place_and_not_an_object(shards: Path) -> None:
    path = write(
        shards / "many.tar",
        [part for i in range(500) for part in [(f"{i}.png", b"x" * 5), (f"{i}.cls", b"%d" % (i % 9))]],
    )
    assert len(pickle.dumps(from_shards(path).images)) < 500 * 28 + 1000


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "is empty"), (b"text", "is not an image"), (picture(1)[:45], "is ")]
)
def test_an_image_that_cannot_be_read_names_shard_and_member(tmp_path: Path, data: bytes, reason: str) -> None:
    path = write(tmp_path / "a.tar", {"x/1.png": picture(0), "x/1.cls": b"0", "x/2.png": data, "x/2.cls": b"1"})
    dataset = from_shards(path)
    assert level(dataset, 0) == 0
    with pytest.raises(ImageError, match=reason) as error:
        level(dataset, 1)
    assert error.value.source == f"{path}:x/2.png"


def test_a_shard_cut_while_in_use_is_an_error_of_the_image(shards: Path) -> None:
    dataset = from_shards(shards / "train-000000.tar")
    os.truncate(shards / "train-000000.tar", 560)
    with pytest.raises(ImageError, match=r"train-000000\.tar:0000\.png: is cut short"):
        level(dataset, 0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.png", b"x")], "the sample 1 has no label"),
        ([("1.png", b"x"), ("1.cls", b"0"), ("d/2.cls", b"0")], r"the sample d/2 has no images.*got d/2\.\{cls\}"),
        ([("1.png", b"x"), ("1.jpg", b"x"), ("1.cls", b"0")], r"the sample 1 has 2 images.*1\.png and 1\.jpg"),
        ([("1.png", b"x"), ("1.cls", b" ")], r"1\.cls holds no label: it is empty"),
        ([("1.png", b"x"), ("1.cls", b"\xff")], r"1\.cls holds no label: .*utf-8"),
        ([("1.png", b"x"), ("1.json", b"{}")], r"1\.json holds no label: expected"),
        ([("1.png", b"x"), ("1.json", b'{"label": true}')], r"1\.json holds no label: expected"),
        ([("1.png", b"x"), ("1.json", b'{"label": [1]}')], r"1\.json holds no label: expected"),
        ([("1.png", b"x"), ("1.json", b"[1]")], r"1\.json holds no label: expected"),
        ([("1.png", b"x"), ("1.json", b"{label}"), ("1.txt", b"a")], r"1\.json holds no label: Expecting"),
        ([("1.png", b"x"), ("1.PNG", b"x"), ("1.cls", b"0")], r"the member 1\.PNG twice"),
        ([("1.png", b"x"), ("1.cls", b"0"), ("2.png", b"x"), ("2.cls", b"0"), ("1.png", b"x")], "the sample 1 twice"),
        ([("README", b"nothing here")], "holds no sample"),
        ([], "holds no sample"),
    ],
)
def test_a_sample_that_is_not_whole_is_named(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    path = write(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message) as error:
        from_shards(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_shard_is_refused_wherever_it_was_cut(shards: Path) -> None:
    path = shards / "train-000001.tar"
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512  # where the end mark begins
    for size in [*range(0, end, 100), *range(0, end + 1, 512), end + 511]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"train-000001\.tar (is|has).*(truncated|damaged)"):
            from_shards(str(shards / "*.tar"))
    path.write_bytes(whole[: end + 512])  # half an end mark is one
    assert len(from_shards(path)) == 4


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(shards: Path) -> None:
    path = shards / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[2048 + 20] ^= 1  # the name in the third header, which its checksum covers
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged: there is no tar header at byte 2048"):
        from_shards(path)


def test_shards_joined_with_cat_are_refused(shards: Path) -> None:
    joined = shards / "all.tar"
    joined.write_bytes(b"".join(path.read_bytes() for path in sorted(shards.glob("train*.tar"))))
    with pytest.raises(DataError, match=r"all\.tar goes on after its end mark"):
        from_shards(joined)


@pytest.mark.parametrize(("mode", "word"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_shard_is_refused_whatever_its_name(tmp_path: Path, mode: str, word: str) -> None:
    with tarfile.open(tmp_path / "a.tar", mode) as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(DataError, match=rf"a\.tar is compressed \({word}\) and cannot be read at random"):
        from_shards(tmp_path / "a.tar")


def test_what_matches_no_shard_is_named(shards: Path) -> None:
    for pattern, missing in [
        ("train-{000001..000003}.tar", "train-000003.tar"),
        ("val-*.tar", r"val-\*\.tar"),
        ("x", "x"),
    ]:
        with pytest.raises(DataError, match=f"there is no shard .*{missing}"):
            from_shards(str(shards / pattern))
    with pytest.raises(DataError, match="counts down"):
        from_shards(str(shards / "train-{3..1}.tar"))
    with pytest.raises(DataError, match=r"train-000000\.tar is named twice"):
        from_shards([shards / "train-000000.tar", str(shards / "train-*.tar")])
    with pytest.raises(DataError, match="empty list"):
        from_shards([])
    with pytest.raises(DataError, match="is no tar file"):
        from_shards(write_text(shards / "a.tar", "text" * 500))
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        from_shards(shards)


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.tar", True), ("a/{0..9}.tar", True), ("a-*.TAR", True), ("a.tar.gz", True), ("a.tgz", True), ("tar", False)],
)
def test_shards_are_told_by_their_name(text: str, expected: bool) -> None:
    assert is_shards(text) is expected


def test_what_is_typed_leads_to_the_right_reader(shards: Path) -> None:
    assert len(load_source(str(shards / "train-{000000..000001}.tar"))) == 8
    assert len(load_source(shards / "train-000002.tar")) == 4
    folder = shards / "photos.tar" / "red"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(0))
    assert load_source(folder.parent).classes == ("red",)
    with pytest.raises(DataError, match="does not exist"):
        load_source(shards / "nothing")
