"""Near-duplicates in any folder of photos, at a threshold found on these photos themselves, without labels.

Papers: features of DINO for copy detection, Caron et al. 2021 (arXiv:2104.14294); JPEG and crops as test changes, as
in Copydays, Douze et al. 2009 ("Evaluation of GIST descriptors for web-scale image search", CIVR). The rate of errors
is one of searches, not of pairs: the false-positive identification rate of biometrics (ISO/IEC 19795-1).

    python recipes/near_duplicates.py --data photos/ --out runs/duplicates --model timm:vit_small_patch16_224.dino

Data: any folder of images, in which nothing is changed or deleted. Without --model only equal files are found.

A photo that has no copy is linked wrongly when the most alike other photo of the whole folder reaches the threshold.
These best scores of --sample photos are the non-matches: half of the photos set the threshold for --far, the others
judge it, and altered copies of the judged ones tell how many copies are found. A rate of searches holds for the folder
as large as it is; one of pairs would let more photos be linked wrongly the more there are.

True copies in the folder would pass for non-matches and drive the threshold up. So photos that agree in 16 x 16 grey
pixels are taken for copies, and the next best one counts. Of 327 photographs of Caltech-101 that takes out 99 % of the
recoloured copies, all that were resized or recompressed, 42 % of the cropped ones, and one pair of different photos,
two banknotes. Copies that it misses cost found copies and add no wrong link; where different photos agree, as bursts
and products on white may, more are linked than --far says. different.html shows the pairs that set the threshold: move
the copies that you see in it out of the folder and run again.

Writes exact.csv, groups.csv, groups.html (the doubtful groups first), different.html and the index, in which a second
run embeds only what is new. Time: nearly all of it embedding, with ViT-S/16 at 19.5 photos a second on two cores
(benchmarks/RESULTS.md), 1,000 more for the altered copies; then all pairs are compared in blocks, 100,000 photos in
half a minute, a million in an hour. What pre-trained weights find has not been measured; random weights find little.
"""

import argparse
import csv
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from vitembed import Embedder, Hit, Index, metrics, sync
from vitembed.cli.models import location_of, open_model
from vitembed.cli.output import print_table, warn
from vitembed.errors import ConfigError, DataError, VitembedError
from vitembed.files import atomic_path
from vitembed.gallery import Row, contact_sheet, group_rows
from vitembed.images import load_image
from vitembed.index import Record
from vitembed.index.clusters import sample
from vitembed.index.duplicates import near_duplicates
from vitembed.index.files import FileRecord
from vitembed.index.folder import Folder, shown
from vitembed.index.queries import search_others
from vitembed.verify import impostors_needed, predicted_far_interval
from vitembed.verify.thresholds import threshold_for_far
from vitembed.verify.words import share_in_words

COPIED = 200  # judged photos that altered copies are made of, five of each
NEAREST = 20  # photos looked through for one that is no copy
AGREE = 0.95  # correlation of grey pixels from which on two photos are taken for copies
SHOWN = 10  # groups that are printed; the files have all of them
CHANGES = ("cropped", "recoloured", "resized", "recompressed")


def main() -> None:
    """Read the arguments; an error is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of photos")
    parser.add_argument("--out", type=Path, required=True, help="folder for the index and what is found")
    parser.add_argument("--model", help="a folder, or another name that Embedder.from_pretrained takes")
    parser.add_argument("--far", type=float, default=0.01, help="share of photos without a copy that may be linked")
    parser.add_argument("--sample", type=int, default=2_000, help="photos that set and judge the threshold")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        run(args)
    except (VitembedError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def run(args: argparse.Namespace) -> None:
    """Find equal files; then, with a model, the threshold and the groups."""
    names = Folder(args.data).list().names
    there, needed = min(args.sample, len(names)), 2 * impostors_needed(args.far)
    if args.model is not None and there < needed:  # said before the work
        least = math.ceil(6_000 / max(there, 6)) / 1_000
        raise ConfigError(
            f"--far {args.far:g} takes {needed:,} photos, to set the threshold and to judge it; got {there:,}. "
            f"Take a --far of at least {least:g}, more photos or a larger --sample"
        )
    same = exact_copies(Folder(args.data), names)
    args.out.mkdir(parents=True, exist_ok=True)
    table = ((n, shown(name)) for n, copies in enumerate(same, 1) for name in copies)
    write_csv(args.out / "exact.csv", "group file", table)
    print(f"{sum(map(len, same))} files in {len(same)} groups of equal bytes: {args.out / 'exact.csv'}", flush=True)
    if args.model is None:
        return
    model, place = open_model(args.model), args.out / "photos.index"
    new = not place.exists()
    with Index.create(place, model.dim, location=location_of(args.model)) if new else Index.open(place) as index:
        failed = sync(index, model, args.data, progress=True).failed
        for path, reason in list(failed.items())[:SHOWN]:
            warn(f"{len(failed)} files are set aside: {path}: {reason}")
        pairs = most_alike_others(index, args.sample, args.seed)
        threshold = find_threshold(model, pairs, args.far, args.seed)
        groups = sorted(near_duplicates(index, threshold, progress=True), key=lambda group: group.weakest)
    pairs.sort(key=lambda pair: -pair.other.score)
    note = "The most alike pairs that were taken for different photos. They set the threshold: is any of them a copy?"
    sheet = [Row([pair.other], [pair.photo]) for pair in pairs[:100]]
    contact_sheet(args.out / "different.html", sheet, "Taken for different photos", note=note)
    rows = group_rows(groups)
    table = ((n, hit.id, hit.score, groups[n - 1].weakest) for n, row in enumerate(rows, 1) for hit in row.hits)
    write_csv(args.out / "groups.csv", "group file score_to_first lowest_linked_score", table)
    contact_sheet(args.out / "groups.html", rows, "Near-duplicates", note=f"Linked from a score of {threshold:.4f} on.")
    for row in rows[:SHOWN]:
        print(row.heading)
        print_table([("", hit.score, hit.id) for hit in row.hits])
    print(f"{sum(len(row.hits) for row in rows)} photos in {len(rows)} groups: {args.out / 'groups.html'}")


def exact_copies(folder: Folder, names: Iterable[str]) -> list[list[str]]:
    """Return groups of two or more files of equal bytes; a file is read only if another one has its size."""
    sizes, contents = defaultdict[int, list[str]](list), defaultdict[str | None, list[str]](list)
    for name in names:
        if isinstance(file := folder.look(name), FileRecord):  # else it cannot be used, as sync will say
            sizes[file.size].append(name)
    for name in (name for alike in sizes.values() if len(alike) > 1 for name in alike):
        if isinstance(file := folder.read(name), FileRecord):
            contents[file.digest].append(name)
    return sorted(copies for copies in contents.values() if len(copies) > 1)


class Pair(NamedTuple):
    """A photo and the most alike other one that is no copy of it by its pixels.

    Photos of one family have it in common: from each to its most alike other one and so on, all ways end at one pair.
    """

    photo: Record
    other: Hit
    family: str


def most_alike_others(index: Index, limit: int, seed: int) -> list[Pair]:
    """Return drawn photos, each with the most alike other one of the whole index that is no copy of it."""
    drawn = sample(index, limit, seed)
    found = search_others(index, drawn.vectors, [{name} for name in drawn.ids], NEAREST, recall=1)
    others: dict[str, tuple[Record, Hit]] = {}
    for photo, hits in zip(map(Record, drawn.ids, drawn.vectors, drawn.metadata), found, strict=True):
        other = next((hit for hit in hits if not agree(photo.metadata["path"], hit.metadata["path"])), None)
        if other is not None:
            others[photo.id] = photo, other
    copied = sum(
        photo not in others or hits[0].id != others[photo][1].id for photo, hits in zip(drawn.ids, found, strict=True)
    )
    print(f"{len(drawn)} photos drawn; the most alike other one of {copied} is a copy by its pixels")
    following = {name: other.id for name, (_, other) in others.items()}
    return [Pair(photo, other, family(photo.id, following)) for photo, other in others.values()]


def family(name: str, following: dict[str, str]) -> str:
    """Return the name of the pair, or of the photo that was not drawn, where following the names ends."""
    way = [name]
    while way[-1] in following and following[way[-1]] not in way:
        way.append(following[way[-1]])
    return min(way[-1], following.get(way[-1], way[-1]))


def agree(one: str, other: str) -> bool:
    """Tell whether two photos are taken for copies by their pixels."""
    a, b = grey_pixels(one), grey_pixels(other)
    return bool((a @ b + a.size) / np.sqrt((a @ a + a.size) * (b @ b + b.size)) >= AGREE)  # flat ones agree, too


@lru_cache(10_000)
def grey_pixels(path: str) -> NDArray[np.float32]:
    """Return (256,) grey values of the squeezed photo, less their mean."""
    pixels = np.asarray(load_image(path).convert("L").resize((16, 16), Image.Resampling.BOX), np.float32).ravel()
    return pixels - pixels.mean()


def find_threshold(model: Embedder, pairs: list[Pair], far: float, seed: int) -> float:
    """Return the threshold that half of the families of photos set, and print what the other half shows of it."""
    rng = np.random.default_rng(seed)
    sizes = Counter(pair.family for pair in pairs)
    names = rng.permutation(sorted(sizes))
    half = int(np.searchsorted(np.cumsum([sizes[name] for name in names]), len(pairs) / 2)) + 1
    fitting = set(names[:half])
    fitted, judged = ([pair for pair in pairs if (pair.family in fitting) is side] for side in (True, False))
    if not judged:
        raise DataError(
            "all photos have the same most alike ones, so none are left to judge the threshold on; add others"
        )
    scores = np.array([pair.other.score for pair in fitted])
    threshold = min(threshold_for_far(scores, far), 1.0)
    families = np.array([[pair.family] * 2 for pair in fitted])
    interval = predicted_far_interval(scores, families, far, max(1, len(names) - half))
    wrong, of_what = sum(pair.other.score >= threshold for pair in judged), "photos without a copy"
    print(f"photos are linked from a score of {threshold:.4f} on; half of the drawn ones set it:")
    said = share_in_words(float(np.mean(scores >= threshold)), interval, len(scores), of_what, "would be linked")
    print(f"  of so many others, {said}\n  of the other half, {wrong} of {len(judged)} are linked", flush=True)
    photos = [judged[at].photo for at in rng.permutation(len(judged))[:COPIED]]
    print(f"altered copies of {len(photos)} of the other half that are linked to their photo, with 95 % intervals:")
    print_table(list(copies_found(model, photos, threshold, rng)))
    return threshold


def copies_found(
    model: Embedder, photos: Sequence[Record], threshold: float, rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """Yield for each change the share of photos whose altered copy is linked to them, with its 95 % interval."""
    kinds, found = [*((name,) for name in CHANGES), CHANGES], []
    for photo in photos:
        image = load_image(photo.metadata["path"])
        copies = model.encode([altered(image, kind, rng) for kind in kinds], workers=0)
        found.append(copies @ photo.vector >= threshold)
    for kind, linked in zip(kinds, np.transpose(found), strict=True):
        low, high = metrics.wilson_interval(int(linked.sum()), len(linked))
        yield f"  {' and '.join(kind)}", f"{linked.mean():.1%} ({low:.1%} to {high:.1%})"


def altered(image: Image.Image, changes: Sequence[str], rng: np.random.Generator) -> Image.Image:
    """Return a copy without up to 5 % at each side, of other light and colours (a quarter), smaller, or after JPEG."""
    if "cropped" in changes:
        left, top, right, bottom = (rng.uniform(0, 0.05, 4) * np.tile(image.size, 2)).astype(int).tolist()
        image = image.crop((left, top, image.width - right, image.height - bottom))
    if "recoloured" in changes:
        for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = kind(image).enhance(rng.uniform(0.75, 1.25))
    if "resized" in changes:
        factor = rng.uniform(0.3, 0.9)
        image = image.resize([max(1, round(side * factor)) for side in image.size])
    if "recompressed" in changes:
        image.save(buffer := io.BytesIO(), "JPEG", quality=int(rng.integers(30, 86)))
        image = load_image(Image.open(buffer))
    return image


def write_csv(path: Path, header: str, rows: Iterable[Sequence[object]]) -> None:
    """Write a table, wholly or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(), *rows])


if __name__ == "__main__":
    main()
