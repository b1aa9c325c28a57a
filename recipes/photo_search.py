"""Search by example in any folder of photos: one command brings the index up to date, maps it and answers with a page.

Papers: features of DINO as nearest neighbours find them, Caron et al. 2021 (arXiv:2104.14294); the map is t-SNE, van
der Maaten and Hinton 2008 (JMLR 9).

    python recipes/photo_search.py --data photos/ --out runs/search --model timm:vit_small_patch16_224.dino
    python recipes/photo_search.py --data photos/ --out runs/search dog.jpg beach.jpg --where 'year>=2020' -k 24

Data: any folder of images, in which nothing is changed. The first run embeds all of them, later ones only what is new
or changed, with the model of the first. What files say of themselves becomes metadata to filter by: folder (below
--data), width and height in pixels, and from EXIF year, month, taken and camera, where a camera wrote them; conditions
are those of `vitembed search --where`, and all of them must hold. Then the index is made faster, where that pays, at a
recall of 0.95, searches with a filter staying exact. Without a query five photos of the folder, drawn by --seed, are
searched with, which shows at once what the model takes for alike. A query is no hit of its own.

Writes photos.index, search.html (each query with its hits) and map.html (alike photos lie together). Time: nearly all
of it embedding, with ViT-S/16 at 19.5 photos a second on two cores (benchmarks/RESULTS.md); the map of 5,000 photos
takes a minute, and a later run without changes the seconds of loading the model. How good the hits are depends on the
model alone and was not measured here; `vitembed evaluate` measures it where photos have labels.
"""

import argparse
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from vitembed import Embedder, Index, sync
from vitembed.cli.models import find_model, location_of, open_model
from vitembed.cli.output import print_table, warn
from vitembed.embedding_map import map_index
from vitembed.errors import CheckpointError, DataError, VitembedError
from vitembed.gallery import contact_sheet, search_rows
from vitembed.images import load_image
from vitembed.index import Record
from vitembed.index.filters import parse_texts
from vitembed.index.queries import search_others

EXAMPLES = 5  # photos that are searched with where none is named
BATCH = 4_096  # entries that are given metadata in one change
SHOWN = 10  # files that cannot be used, of those that are named one by one
KEYS = ("folder", "year", "month", "taken", "camera", "width", "height")


def main() -> None:
    """Read the arguments; an error is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queries", type=Path, nargs="*", metavar="QUERY", help="images to search with")
    parser.add_argument("--data", type=Path, required=True, help="folder of photos")
    parser.add_argument("--out", type=Path, required=True, help="folder for the index and the pages")
    parser.add_argument("--model", help="for the first run: a folder, or another name of Embedder.from_pretrained")
    parser.add_argument("--where", action="append", default=[], metavar="FILTER", help="such as year>=2020")
    parser.add_argument("-k", type=int, default=12, help="hits for each query")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        run(args)
    except (VitembedError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def run(args: argparse.Namespace) -> None:
    """Bring the index and its map up to date; search; print and write what is found."""
    where, place = parse_texts(args.where), args.out / "photos.index"
    for query in args.queries:
        load_image(query)  # one that cannot be read is told before the work
    new = not place.exists()
    if new and args.model is None:
        raise CheckpointError(f"there is no index {place} yet; name the --model that it is to be made with")
    model = open_model(args.model) if new else None
    args.out.mkdir(parents=True, exist_ok=True)
    with Index.create(place, model.dim, location=location_of(args.model)) if model else Index.open(place) as index:
        model = model or open_model(find_model(place, index.location, args.model))
        update(index, model, args.data, args.out / "map.html", new)
        matching = index.entries(where)
        asked = " and ".join(args.where) or "no condition"
        print(f"{len(matching):,} of {len(index):,} photos meet {asked}", flush=True)
        if not matching:
            raise DataError(f"no photo meets {asked}; there are {'; '.join(described(index.entries().values()))}")
        queries = [entry_or_path(index, path, args.data) for path in args.queries] or examples(
            index, matching, args.seed
        )
        vectors = [query.vector if isinstance(query, Record) else model.encode(query)[0] for query in queries]
        own = [{query.id} if isinstance(query, Record) else set[str]() for query in queries]
        found = search_others(index, np.stack(vectors), own, args.k, where)
    note = f"Photos that meet {asked}: {'; '.join(described(matching.values()))}."
    contact_sheet(args.out / "search.html", search_rows(queries, found), "Photos alike", note=note, per_row=args.k)
    for query, hits in zip(queries, found, strict=True):
        print(query.id if isinstance(query, Record) else query)
        print_table([("", hit.score, hit.id) for hit in hits])
    print(f"{args.out / 'search.html'} {args.out / 'map.html'}")


def update(index: Index, model: Embedder, folder: Path, map_file: Path, new: bool) -> None:
    """Bring an index up to date with a folder: vectors, metadata, structure, map."""
    report = sync(index, model, folder, progress=True)
    for path, reason in list(report.failed.items())[:SHOWN]:
        warn(f"{len(report.failed)} files are set aside: {path}: {reason}")
    changed = annotate(index, folder)
    if new:
        index.compact()  # without the rows that had no metadata yet; later there are few of these
    chosen = index.optimize(recall=0.95, progress=True)
    if changed or report.removed or not map_file.exists():
        map_index(index, map_file, label="year" if index.entries({"year": {"$exists": True}}) else "folder")
    print(f"{report.embedded:,} photos embedded, {report.removed:,} removed; search: {chosen.kind}, as {chosen.reason}")


def annotate(index: Index, folder: Path) -> int:
    """Give entries whose file is new or changed what it says of itself, beside what others annotated."""
    fresh: dict[str, dict[str, Any]] = {}
    for name, metadata in index.entries().items():
        path = Path(metadata["path"])
        time = path.stat().st_mtime_ns if path.exists() else None
        if time is not None and metadata.get("mtime_ns") != time:
            kept = {key: value for key, value in metadata.items() if key not in KEYS}
            fresh[name] = {**kept, "mtime_ns": time, "folder": Path(name).parent.as_posix(), **said_by(path)}
    names = list(fresh)
    for start in range(0, len(names), BATCH):
        batch = names[start : start + BATCH]
        index.annotate(batch, [fresh[name] for name in batch])
    return len(names)


def said_by(path: Path) -> dict[str, Any]:
    """Return a photo's width and height as it is seen; when and by which camera it was taken, where that is said."""
    said: dict[str, Any] = {}
    with warnings.catch_warnings(action="ignore"), suppress(Exception):  # EXIF is whatever some program wrote
        with Image.open(path) as image:
            said["width"], said["height"] = image.size
            exif = image.getexif()
        if exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # lies on its side
            said["width"], said["height"] = said["height"], said["width"]
        if camera := str(exif.get(ExifTags.Base.Model, "")).strip("\0 "):
            said["camera"] = camera
        original = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
        taken = datetime.strptime(str(original).strip("\0 "), "%Y:%m:%d %H:%M:%S")
        said |= {"taken": taken.isoformat(), "year": taken.year, "month": taken.month}
    return said


def entry_or_path(index: Index, path: Path, folder: Path) -> Record | Path:
    """Return the entry of an image that lies in the folder, which is no hit of its own; else its path."""
    if path.resolve().is_relative_to(folder.resolve()):
        name = path.resolve().relative_to(folder.resolve()).as_posix()
        return index.get(name) if name in index else path
    return path


def examples(index: Index, names: Iterable[str], seed: int) -> list[Record]:
    """Return some entries, drawn by the seed."""
    known = sorted(names)
    return [index.get(name) for name in np.random.default_rng(seed).permutation(known)[:EXAMPLES].tolist()]


def described(entries: Collection[Mapping[str, Any]]) -> Iterator[str]:
    """Yield for each key what its values are, of smallest and largest where they are many."""
    for key in KEYS:
        values = sorted({metadata[key] for metadata in entries if key in metadata}, key=lambda at: (str(type(at)), at))
        if values:
            yield f"{key} {', '.join(map(str, values)) if len(values) <= 4 else f'{values[0]} to {values[-1]}'}"


if __name__ == "__main__":
    main()
