"""The order in which the exact losses see a batch: every class is a slice of the queries and a slice of the references.

The queries are the batch; the references are other rows with labels (a memory, a batch gathered from all processes), or
the batch itself. One order of classes holds for both sides, classes of like size beside each other, so that the
positives of a class are a small dense table and classes alike in size are one stack of tables.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vitembed.errors import ConfigError, VectorError

# Stacks of tables are made in parts of so many numbers at most.
_PART = 2**20


@dataclass(frozen=True)
class Group:
    """Classes alike in size that lie beside each other: m classes of c queries and k references each.

    Attributes:
        queries: the sorted positions of the m * c queries.
        references: the sorted positions of the m * k references.
        asked: c, 1 at least.
        held: k.
    """

    queries: slice
    references: slice
    asked: int
    held: int

    @property
    def classes(self) -> int:
        """How many classes the group has: m."""
        return int(self.queries.stop - self.queries.start) // self.asked

    def of_queries(self, rows: Tensor) -> Tensor:
        """View the group's part of (B, ...) as (m, c, ...)."""
        return rows[self.queries].view(self.classes, self.asked, *rows.shape[1:])

    def of_references(self, rows: Tensor) -> Tensor:
        """View the group's part of (M, ...) as (m, k, ...)."""
        return rows[self.references].view(self.classes, self.held, *rows.shape[1:])

    def parts(self, dim: int) -> Iterator[tuple[slice, slice]]:
        """Cut into (classes, queries of each) such that neither rows of `dim` numbers nor tables fill the memory."""
        step = max(_PART // max(self.asked * self.held, (self.asked + self.held) * dim), 1)
        within = max(_PART // max(self.held, 1), 1)
        for first in range(0, self.classes, step):
            for query in range(0, self.asked, within):
                yield slice(first, min(first + step, self.classes)), slice(query, min(query + within, self.asked))


@dataclass(frozen=True)
class Layout:
    """Queries and references in the order of their classes.

    Attributes:
        queries: (B,) int64, the batch's row at each sorted position.
        references: (M,) int64, the same for the references.
        query_classes: (B,) int64, a number for the class at each sorted position; ascending.
        reference_classes: (M,) int64, the same.
        places: (B,) int64, where each query stands among the references of its class; None where it is not there.
        hosted: `query_classes` and `reference_classes` on the CPU.
        groups: the classes that have queries, by ascending numbers of references and then of queries.
        symmetric: whether the references are the batch itself.
    """

    queries: Tensor
    references: Tensor
    query_classes: Tensor
    reference_classes: Tensor
    places: Tensor | None
    hosted: tuple[Tensor, Tensor]
    groups: list[Group]
    symmetric: bool

    @classmethod
    def of(cls, labels: Tensor, references: Tensor | None, own: int | None, device: torch.device) -> "Layout":
        """Sort labels (B,) and those of references (M,); on the CPU they cost the device no synchronisation.

        Args:
            labels: of an integer type.
            references: the same; None where the references are the batch itself.
            own: where query 0 stands among the references; None where no query does.
            device: where the layout is needed.

        Raises:
            ConfigError: `own` is not where the references have the labels of the batch.
        """
        every = labels if references is None else torch.cat([labels.long(), references.to(labels.device, torch.int64)])
        _, classes = torch.unique(every.detach().cpu().long(), return_inverse=True)
        asking = classes[: len(labels)]
        holding = asking if references is None else classes[len(labels) :]
        own = 0 if references is None else own
        _check_own(own, asking, holding)
        asked, held = (torch.bincount(side, minlength=len(classes)) for side in (asking, holding))
        # By references, then queries; and last, since no anchor has them for positives, the classes without queries.
        wide = len(labels) + 1
        order = torch.argsort(held * wide + asked + (asked == 0) * wide * wide * (len(holding) + 1), stable=True)
        asked, held = asked[order], held[order]
        rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
        asking, queries = rank[asking].sort(stable=True)
        holding, rows = rank[holding].sort(stable=True)
        places = torch.empty_like(queries)
        if own is not None:
            position = torch.empty_like(rows).index_copy_(0, rows, torch.arange(len(rows)))
            places = position[own + queries] - (held.cumsum(0) - held)[asking]
        tensors = (queries, rows, asking, holding, places)
        # One transfer to the device for all.
        moved = torch.split(torch.cat(tensors).to(device), [len(tensor) for tensor in tensors])
        return cls(
            queries=moved[0],
            references=moved[1],
            query_classes=moved[2],
            reference_classes=moved[3],
            places=None if own is None else moved[4],
            hosted=(asking, holding),
            groups=_groups(asked, held),
            symmetric=references is None,
        )

    def positives(self, group: Group) -> int:
        """Return how many positives each query of a group has: k, or k - 1 where the query is among them."""
        return group.held if self.places is None else group.held - 1

    @property
    def positive_pairs(self) -> int:
        """How many pairs of a query and another image of its class there are."""
        return sum(group.classes * group.asked * self.positives(group) for group in self.groups)

    @property
    def negative_pairs(self) -> int:
        """How many pairs of a query and an image of another class there are."""
        return sum(group.classes * group.asked * (len(self.references) - group.held) for group in self.groups)

    @property
    def triplets(self) -> int:
        """How many triplets (anchor, positive, negative) there are."""
        return sum(
            group.classes * group.asked * self.positives(group) * (len(self.references) - group.held)
            for group in self.groups
        )

    def ends(self, queries: slice, references: slice) -> tuple[int, int, int, int]:
        """Return the numbers of the first and last class of a slice of queries, and of one of references."""
        asking, holding = self.hosted
        return (
            int(asking[queries.start]),
            int(asking[queries.stop - 1]),
            int(holding[references.start]),
            int(holding[references.stop - 1]),
        )

    def without_own(self, table: Tensor, group: Group, part: tuple[slice, slice]) -> Tensor:
        """Leave out of a part of a group's table (m, c, k) each query's place for itself: (m, c, k - 1), if any."""
        others = self._others(group, part)
        return table if others is None else table.gather(2, others)

    def with_own(self, table: Tensor, group: Group, part: tuple[slice, slice]) -> Tensor:
        """Put a 0 for each query itself into a part of a group's table of positives: (m, c, k)."""
        others = self._others(group, part)
        return table if others is None else table.new_zeros(*table.shape[:2], group.held).scatter_(2, others, table)

    def _others(self, group: Group, part: tuple[slice, slice]) -> Tensor | None:
        """Return where among the k references of its class each query's positives are: (m, c, k - 1)."""
        if self.places is None:
            return None
        index = torch.arange(group.held - 1, device=self.places.device)
        return index + (index >= group.of_queries(self.places)[part].unsqueeze(2))


def _check_own(own: int | None, asking: Tensor, holding: Tensor) -> None:
    """Refuse a place among the references where the batch cannot be."""
    if own is None:
        return
    if not 0 <= own <= len(holding) - len(asking):
        raise ConfigError(
            f"own must be where the {len(asking)} queries begin among the {len(holding)} references, from 0 to "
            f"{len(holding) - len(asking)}; got {own}"
        )
    if not torch.equal(asking, holding[own : own + len(asking)]):
        raise ConfigError(
            f"own={own} says that the references from there on are the queries, but their labels differ: "
            "pass own=None where the queries are not among the references"
        )


def _groups(asked: Tensor, held: Tensor) -> list[Group]:
    """Join neighbouring classes with the same numbers of queries and references; classes without queries end it."""
    sizes = torch.stack([asked, held], dim=1)[: int((asked > 0).sum())]
    distinct, classes = torch.unique_consecutive(sizes, dim=0, return_counts=True)
    groups, query, reference = [], 0, 0
    for (c, k), m in zip(distinct.tolist(), classes.tolist(), strict=True):
        groups.append(Group(slice(query, query + m * c), slice(reference, reference + m * k), c, k))
        query, reference = query + m * c, reference + m * k
    return groups


def check_references(
    rows: Tensor, references: tuple[Tensor, Tensor] | None, own: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the rows of references, in the type of the batch's and where they are, and their labels.

    Raises:
        VectorError: their shapes or types do not fit.
        ConfigError: there is an `own` without references.
    """
    if references is None:
        if own:  # 0 is true: the batch is its own references
            raise ConfigError(f"own tells where the batch is among references, but there are none; got own={own}")
        return None, None
    others, labels = references
    if others.ndim != 2 or others.shape[1] != rows.shape[1] or not others.is_floating_point():
        raise VectorError(
            f"references must be floating-point rows of shape (M, {rows.shape[1]}), as the batch has them; got "
            f"{others.dtype} of {tuple(others.shape)}"
        )
    if labels.shape != others.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise VectorError(
            f"references need ({len(others)},) integer labels, one for each row; got {labels.dtype} of "
            f"{tuple(labels.shape)}"
        )
    return others.to(rows), labels
