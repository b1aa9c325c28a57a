"""Which writer, and which kind of image, the folders of signatures name."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vitembed.errors import DataError
from vitembed.layouts import Names, names_of_folders, names_of_signatures

ROOT = Path("data")
Reader = Callable[[Path, Sequence[Path]], Names]
READERS = (names_of_folders, names_of_signatures)


def of(*names: str) -> list[Path]:
    return [ROOT / name for name in names]


@pytest.mark.parametrize("read", READERS)
def test_the_names_of_cedar_give_writer_and_kind(read: Reader) -> None:
    paths = of("full_forg/forgeries_7_24.png", "full_org/original_12_1.png", "full_org/original_7_3.png")
    assert read(ROOT, paths) == (["7/forged/forgeries_7_24.png", "12", "7"], ["7", None, None])


@pytest.mark.parametrize("read", READERS)
def test_the_case_of_the_names_of_cedar_does_not_matter(read: Reader) -> None:
    paths = of("Full_Org/Original_1_1.TIF", "FULL_FORG/Forgeries_1_1.tif")
    assert read(ROOT, paths) == (["1", "1/forged/Forgeries_1_1.tif"], [None, "1"])


@pytest.mark.parametrize("read", READERS)
def test_both_layouts_are_read_together_and_folders_above_are_part_of_the_name(read: Reader) -> None:
    paths = of("cedar/full_org/original_1_1.png", "cedar/full_forg/forgeries_1_1.png", "nl/1/genuine/a.png")
    assert read(ROOT, [*paths, ROOT / "nl/1/forged/a.png"]) == (
        ["cedar/1", "cedar/1/forged/forgeries_1_1.png", "nl/1", "nl/1/forged/a.png"],
        [None, "cedar/1", None, "nl/1"],
    )


@pytest.mark.parametrize("read", READERS)
def test_two_people_of_one_name_are_never_made_one_writer(read: Reader) -> None:
    paths = of("full_org/original_1_1.png", "full_forg/forgeries_1_1.png", "1/genuine/a.png")
    with pytest.raises(DataError, match=r"1/genuine/a\.png is of a writer '1', and so are images in the other layout"):
        read(ROOT, paths)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "stray",
    [
        "full_org/forgeries_1_1.png",  # would be a genuine signature by its folder and a forgery by its name
        "full_forg/original_1_1.png",
        "full_org/original_1.png",
        "full_org/original_a_1.png",
        "full_org/original_1_1 copy.png",
        "full_org/more/original_1_1.png",
        "original_1_1.png",
        "scans/1.png",
    ],
)
def test_an_image_that_cedar_would_not_name_so_never_makes_one_class_of_all_forgeries(read: Reader, stray: str) -> None:
    paths = of("full_org/original_1_2.png", "full_forg/forgeries_1_2.png", stray)
    with pytest.raises(DataError, match=rf"{stray} lies in no .*CEDAR"):
        read(ROOT, paths)


def test_a_folder_that_is_named_as_one_of_cedar_is_a_class_where_no_forgeries_are() -> None:
    paths = of("full_org/original_1_2.png", "full_org/scan.png", "others/1.png")
    assert names_of_folders(ROOT, paths) == (["full_org", "full_org", "others"], [None] * 3)


def test_one_of_cedars_folders_alone_names_no_writers() -> None:
    alone = ROOT / "full_forg"
    with pytest.raises(DataError, match="lies in no class"):
        names_of_folders(alone, [alone / "forgeries_1_1.png"])
    with pytest.raises(DataError, match="lies in no data/full_forg/WRITER/genuine"):
        names_of_signatures(alone, [alone / "forgeries_1_1.png"])
