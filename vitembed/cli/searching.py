"""`vitembed search`: images, entries or vectors as queries, one by one or all together."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitembed.cli.indexes import open_index
from vitembed.cli.models import find_model, open_model
from vitembed.cli.output import Device, IndexPath, Json, print_json, print_table, write_sheet
from vitembed.errors import ConfigError
from vitembed.files import atomic_path

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

    from vitembed.gallery import Query, Row
    from vitembed.index import Hit, Index


def search(
    index: IndexPath,
    queries: Annotated[list[Path] | None, typer.Argument(metavar="[QUERY]...", help="Images to search with.")] = None,
    ids: Annotated[
        list[str] | None,
        typer.Option("--id", metavar="ID", help="An entry to search with; may be repeated."),
    ] = None,
    vectors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .npy file of embeddings (n, dim) to search with.")
    ] = None,
    together: Annotated[bool, typer.Option("--together", help="Make one query of all of them.")] = False,
    k: Annotated[int, typer.Option("-k", min=1, help="Hits for each query.")] = 10,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILTER",
            help="Only entries that match: key=value, key!=value, key<5, key^=prefix, or JSON; may be repeated.",
        ),
    ] = None,
    recall: Annotated[
        float | None, typer.Option(help="Share of the true hits to find, for an optimised index; 1 searches exactly.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model's folder, if it is no longer where the index was made with it.")
    ] = None,
    device: Device = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with the pictures as well.")] = None,
    json: Json = False,
) -> None:
    """Find the images of an index that are most alike to each query.

    Example: vitembed search photos.index cat.jpg -k 5

    Example: vitembed search photos.index --id cats/1.jpg --id cats/2.jpg --together --where year>=2020 --html cats.html
    """
    if not queries and not ids and vectors is None:
        raise ConfigError("there is nothing to search with; name images, or give --id or --vectors")
    with open_index(index) as opened, atomic_path(html) if html else nullcontext() as page:
        names, shown, embedded = _queries(opened, queries or [], ids or [], vectors, model, device)
        found = _search(opened, embedded, ids or [], together, k, _filter(where or []), recall)
        if page:
            write_sheet(page, _rows(names, shown, found), f"Search in {index.name}", per_row=k)
        none = "no entry matches" if where else "no other entry" if len(opened) else "the index is empty"
    if json:
        asked: Sequence[object] = [names] if together else names
        print_json(
            [{"query": name, "hits": [hit.as_dict() for hit in hits]} for name, hits in zip(asked, found, strict=True)]
        )
        return
    for name, hits in zip([" + ".join(names)] if together else names, found, strict=True):
        typer.echo(f"{name}:" if hits else f"{name}: {none}")
        print_table([("", hit.score, hit.id) for hit in hits])


def _queries(
    index: "Index", images: list[Path], ids: list[str], vectors: Path | None, model: str | None, device: str | None
) -> "tuple[list[str], list[Query], NDArray[float32]]":
    """Return the queries' names, what a page shows of them, and their vectors (n, dim).

    Entries come first, then vectors, then images.
    """
    import numpy as np

    from vitembed.index.inputs import checked_vectors

    entries = [index.get(name) for name in ids]
    names, parts = list(ids), [entry.vector[None] for entry in entries]
    shown: list[Query] = [*entries]
    if vectors is not None:
        parts.append(checked_vectors(_read(vectors), index.dim, single=True))
        names += [f"{vectors}[{row}]" for row in range(len(parts[-1]))]
        shown.extend(parts[-1])
    if images:
        embedder = open_model(find_model(index.path, index.location, model), device)
        index.require_model(embedder.fingerprint)
        parts.append(embedder.encode(images))
        names += [str(image) for image in images]
        shown.extend(images)
    return names, shown, np.concatenate(parts)


def _search(
    index: "Index",
    vectors: "NDArray[float32]",
    ids: list[str],
    together: bool,
    k: int,
    where: dict[str, Any] | None,
    recall: float | None,
) -> "list[list[Hit]]":
    """Return the hits of each query, or of all together; an entry that was searched with is no hit of its own."""
    from vitembed.index.queries import combined, search_others

    if together:
        return search_others(index, combined(vectors)[None], [set(ids)], k, where, recall)
    own = [{name} for name in ids] + [set[str]()] * (len(vectors) - len(ids))
    return search_others(index, vectors, own, k, where, recall)


def _filter(texts: list[str]) -> dict[str, Any] | None:
    from vitembed.index.filters import parse_text

    parsed = [parse_text(text) for text in texts]
    return {"$and": parsed} if len(parsed) > 1 else parsed[0] if parsed else None


def _read(file: Path) -> Any:
    import numpy as np

    try:
        return np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {file} of vectors") from None
    except (ValueError, EOFError, OSError) as error:
        raise ConfigError(f"{file} is not a .npy file of vectors ({error}); make it with numpy.save") from error


def _rows(names: list[str], shown: "list[Query]", found: "list[list[Hit]]") -> "list[Row]":
    """Return the rows of a page: one for each query, or one for all together."""
    import numpy as np

    from vitembed.gallery import Row

    if len(found) < len(shown):
        return [Row(found[0], shown)]
    # An entry and an image have their names below their pictures.
    headings = [name if isinstance(query, np.ndarray) else "" for name, query in zip(names, shown, strict=True)]
    return [Row(hits, [query], text) for hits, query, text in zip(found, shown, headings, strict=True)]
