"""`vitembed duplicates`, `cluster` and `map`: an index as a whole, in groups and as a picture."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from vitembed.cli.output import IndexPath, Json, Seed, print_figures, print_json, print_table, write_sheet

SHOWN = 10  # members of a cluster that are printed

Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the pictures too, as one HTML file.")]


def duplicates(
    index: IndexPath,
    score: Annotated[
        float, typer.Option(min=-1, max=1, help="The lowest score that links two images; 1 is the same.")
    ] = 0.95,
    html: Html = None,
    json: Json = False,
) -> None:
    """Find the groups of images that are nearly the same: connected by pairs at or above a score.

    Example: vitembed duplicates photos.index --html duplicates.html
    """
    from vitembed.files import atomic_path
    from vitembed.gallery import group_rows
    from vitembed.index import Index
    from vitembed.index.duplicates import near_duplicates

    with Index.open(index) as opened, atomic_path(html) if html else nullcontext() as page:
        groups = near_duplicates(opened, score, progress=True)
        if page:
            note = f"Entries that are connected by pairs of score {score:g} or more; scores are to the first one."
            write_sheet(page, group_rows(groups), f"Near-duplicates in {index.name}", note)
    if json:
        shown = [{**vars(group), "members": [hit.as_dict() for hit in group.members]} for group in groups]
        print_json({"score": score, "groups": shown})
        return
    for group in groups:
        typer.echo(f"{len(group.members)} alike, lowest linked score {group.weakest:.4f}:")
        marks = ["*" if hit.id == group.representative else "" for hit in group.members]
        print_table([("", hit.score, hit.id, mark) for hit, mark in zip(group.members, marks, strict=True)])
    members = sum(len(group.members) for group in groups)
    typer.echo(f"{len(groups)} groups, {members} entries; scores are to the one with *" if groups else "no duplicates")


def cluster(
    index: IndexPath,
    clusters: Annotated[
        int | None, typer.Option(min=1, help="How many; chosen by the silhouette if not given.")
    ] = None,
    html: Html = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Divide an index into clusters of images that are alike.

    Example: vitembed cluster photos.index --clusters 12 --html clusters.html
    """
    from vitembed.files import atomic_path
    from vitembed.gallery import cluster_rows
    from vitembed.index import Index
    from vitembed.index.clusters import cluster as cluster_index

    with Index.open(index) as opened, atomic_path(html) if html else nullcontext() as page:
        found = cluster_index(opened, clusters, seed, progress=True)
        if page:
            note = "The nearest to each centre, with their scores."
            write_sheet(page, cluster_rows(found), f"Clusters of {index.name}", note)
    if json:
        members = [
            {"medoid": one.medoid, "size": len(one.members), "members": [hit.as_dict() for hit in one.members]}
            for one in found.clusters
        ]
        print_json({"silhouette": found.silhouette, "clusters": members})
        return
    for number, one in enumerate(found.clusters, 1):
        typer.echo(f"cluster {number}, {len(one.members)} entries:")
        print_table([("", hit.score, hit.id) for hit in one.members[:SHOWN]])
        if len(one.members) > SHOWN:
            typer.echo(f"  and {len(one.members) - SHOWN} more")
    if found.silhouette is not None:
        typer.echo(f"{len(found.clusters)} clusters, mean silhouette {found.silhouette:.4f}")


def map_entries(
    index: IndexPath,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file to write.")],
    method: Annotated[str, typer.Option(help="tsne, pca, or umap (pip install 'vitembed[map]').")] = "tsne",
    label: Annotated[str | None, typer.Option(metavar="KEY", help="Colour by this key of the metadata.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Entries; of more a sample is drawn.")] = 5_000,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Draw an index as a map: alike images lie together, and show themselves under the pointer.

    Example: vitembed map photos.index --out map.html --label category
    """
    from dataclasses import asdict

    from vitembed.embedding_map import map_index
    from vitembed.index import Index

    with Index.open(index) as opened:
        report = map_index(opened, out, method, limit, seed, label)
    figures = {"map": str(out), **asdict(report)}
    if json:
        print_json(figures)
    else:
        print_figures(figures)
