"""Which images meet in a batch, and which part of it a process gets.

`ClassBalancedSampler` makes batches of P classes with K images each, so that every batch holds positives and negatives;
forgeries come beside the writer that they imitate, and hard neighbours beside what they are mistaken for.
`EpochBatches` goes on in the middle of an epoch and shares batches among processes, whatever makes them.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vitembed.errors import ConfigError, DataError

Ints = NDArray[np.int64]


class Batches(Protocol):
    """Lists of positions, the same for the same `epoch`, whatever was drawn before."""

    epoch: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[int]]: ...


class ClassBalancedSampler:
    """Batches of `classes_per_batch` classes with up to `images_per_class` distinct images each.

    In every epoch every image comes at least once. The images of a class are shuffled and dealt in groups of K (a last
    ragged group is filled up with other images of its class), and each batch takes groups of different classes, from
    those with most groups left. That is the schedule of fewest batches, and a large class does not starve the small
    ones. A class of fewer than K images gives as many as it has; a batch that runs short of classes at the end of the
    epoch is filled with groups of other classes.

    Forgeries are dealt in the same way, beside each group of the writer that they imitate, so that they meet what they
    are to be told from. They come in addition: a batch has at most P (K + `forgeries_per_class`) images. A forgery
    whose writer has no images here is a class like any other.

    With categories, such as the alphabets of characters or the kinds of products, a batch holds more that is alike: G
    of them give up to P / G classes each, as in the category balanced sampling of open-metric-learning. Those come
    first whose classes have most groups left. The places that they leave free, having too few classes with groups left,
    go to classes of any category: some in most batches where a category has few classes, and many at the end of an
    epoch, which is no longer than without categories.

    Set `neighbours` between epochs, and up to half of the classes of a batch are those that the others are mistaken
    for: the hard neighbours of the images chosen first come in themselves, with other images of their classes. Epochs
    keep their length and show every image all the same, so that towards their end fewer neighbours are left to choose.

    Args:
        labels: (N,) class of each image.
        classes_per_batch: P, at least 2.
        images_per_class: K, at least 2.
        seed: epoch `e` is the same for the same seed and neighbours, whatever came before.
        forgery_of: (N,) the class that an image imitates, -1 for a genuine image; None if all are genuine.
        forgeries_per_class: how many forgeries come beside a group at most; None for K.
        categories: (N,) integers of at least 0, the category of each image's class; a forgery that comes beside a
            writer is of the writer's, whatever stands here. None for none.
        categories_per_batch: G, how many of them a batch is drawn from; None to draw without regard to them.

    Attributes:
        epoch: the number of the epoch that `iter` starts.

    Raises:
        ConfigError: if P or K is below 2, there is no room for forgeries, or G is below 1, above P or without
            categories.
        DataError: if there are fewer than two classes, a forgery is not alone in its class, or categories are no whole
            numbers, one a class.
    """

    def __init__(
        self,
        labels: Ints,
        *,
        classes_per_batch: int,
        images_per_class: int,
        seed: int = 0,
        forgery_of: Ints | None = None,
        forgeries_per_class: int | None = None,
        categories: Ints | None = None,
        categories_per_batch: int | None = None,
    ) -> None:
        if classes_per_batch < 2 or images_per_class < 2:
            raise ConfigError(
                "a batch needs at least 2 classes and 2 images a class, else it has no pairs; "
                f"got {classes_per_batch} and {images_per_class}"
            )
        if forgeries_per_class is not None and forgeries_per_class < 1:
            raise ConfigError(f"forgeries_per_class must be at least 1, or None for all; got {forgeries_per_class}")
        self._is_forged = _forgeries_with_writer(labels, forgery_of)
        sides = labels if forgery_of is None else np.where(self._is_forged, forgery_of, labels)
        classes, self._side = np.unique(sides, return_inverse=True)  # (N,) whose group an image is in, 0 to C - 1
        if len(classes) < 2 and not self._is_forged.any():
            raise DataError(f"batches need at least 2 classes to draw from; got {len(classes)}")
        self._classes_per_batch = min(classes_per_batch, len(classes))
        self._sizes = (images_per_class, forgeries_per_class or images_per_class)
        self._category: Ints | None = None  # (C,)
        if categories_per_batch is not None:
            if categories is None:
                raise ConfigError(f"categories_per_batch {categories_per_batch} needs the categories of the images")
            self._category = _category_of_classes(self._side, ~self._is_forged, categories)
            if not 1 <= categories_per_batch <= classes_per_batch:
                raise ConfigError(
                    f"categories_per_batch must lie in [1, {classes_per_batch}], the classes of a batch; "
                    f"got {categories_per_batch}"
                )
        self._categories_per_batch = categories_per_batch
        self._seed = seed
        left = self._deal(np.random.default_rng(0)).left
        self._length = max(int(left.max()), -(-int(left.sum()) // self._classes_per_batch))
        self._neighbours: Ints | None = None
        self.epoch = 0

    @property
    def neighbours(self) -> Ints | None:
        """(N, m) int64, the images that each one is mistaken for, hardest first, -1 for none; None to use none.

        Raises:
            DataError: for another shape, or what is no position.
        """
        return self._neighbours

    @neighbours.setter
    def neighbours(self, neighbours: Ints | None) -> None:
        """Let the epochs to come have these."""
        count = len(self._side)
        if neighbours is not None:
            if neighbours.ndim != 2 or len(neighbours) != count or neighbours.dtype.kind != "i":
                found = f"{neighbours.dtype} of shape {neighbours.shape}"
                raise DataError(f"expected whole numbers of shape ({count}, m), the neighbours of each; got {found}")
            if neighbours.size and not (neighbours.min() >= -1 and neighbours.max() < count):
                raise DataError(f"neighbours must be positions below {count}, or -1 for none")
        self._neighbours = neighbours

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self._seed, self.epoch])
        return self._draw(self._deal(rng), self._neighbours, rng)

    def _deal(self, rng: np.random.Generator) -> "_Dealer":
        return _Dealer(self._side, self._is_forged, self._sizes, rng)

    def _draw(self, dealer: "_Dealer", neighbours: Ints | None, rng: np.random.Generator) -> Iterator[list[int]]:
        size = self._classes_per_batch
        for after in reversed(range(self._length)):  # how many batches come after this one
            order = self._order(dealer, after, rng)
            spare = size - max(0, int(dealer.left.sum()) - size * after)  # groups that need not be new ones
            urgent = np.count_nonzero(dealer.left > after)  # classes that must come now to come to an end
            first = size if neighbours is None else max(size - size // 2, urgent)
            groups = {int(label): dealer.group(label) for label in order[:first]}
            if neighbours is not None:
                images = rng.permutation([image for group in groups.values() for image in group])
                self._invite(neighbours[images], groups, dealer, spare)
            for label in order[first:]:
                if len(groups) < size and int(label) not in groups:
                    groups[int(label)] = dealer.group(label)
            yield [image for group in groups.values() for image in group]

    def _order(self, dealer: "_Dealer", after: int, rng: np.random.Generator) -> Ints:
        """Return the classes that a batch is made of, the first first, and some more.

        Args:
            dealer: knows what is left.
            after: how many batches come after this one.
            rng: breaks ties.
        """
        size = self._classes_per_batch
        priority = dealer.left + rng.random(len(dealer.left))  # those with most groups left, ties at random
        if self._category is None or self._categories_per_batch is None:
            return _largest(priority, size + size // 2)
        left = np.bincount(self._category, dealer.left) / np.bincount(self._category)  # groups a class, by category
        left[left > 0] += rng.random(np.count_nonzero(left))
        together = -(-size // self._categories_per_batch)
        step = dealer.left.max() + 1.0  # from one rank to the next
        for category in _largest(left, self._categories_per_batch):
            members = np.flatnonzero((self._category == category) & (dealer.left > 0))
            if len(members):
                priority[members[_largest(priority[members], together)]] += step
        priority[dealer.left > after] += 2 * step  # those that must come now to come to an end
        return _largest(priority, size + size // 2)

    def _invite(self, neighbours: Ints, groups: dict[int, list[int]], dealer: "_Dealer", spare: int) -> None:
        """Add groups around neighbours of the images of a batch, until it is full or no neighbour can come.

        A group must bring the epoch on, as `_draw` counts it, unless its class has had its turns and there is a spare
        place: then the batches to come suffice for all images that have not been seen.

        Args:
            neighbours: (b, m) of the b images in the groups.
            groups: from class to images, changed in place.
            dealer: deals them.
            spare: how many groups may bring nothing new.
        """
        for image in neighbours.T.ravel().tolist():  # the hardest ones of all images first
            if len(groups) == self._classes_per_batch:
                return
            label = int(self._side[image])
            if image < 0 or label in groups:
                continue
            is_new = dealer.left_after(label, image) < dealer.left[label]
            if is_new or (spare > 0 and dealer.left[label] == 0):
                groups[label] = dealer.group(label, image)
                spare -= not is_new


class EpochBatches:
    """The batches of a sampler from any place of an epoch on, or the shares of one of several processes.

    Every process draws the same batches and takes its share of each, so that what is trained does not depend on how
    many there are. Nothing is counted here: `start` is set by who knows how many batches were trained on, which are
    fewer than a loader with worker processes has asked for.

    Args:
        batches: a sampler; equal in all processes, its neighbours too.
        rank: number of this process.
        world_size: how many processes there are.

    Attributes:
        start: how many batches of the epoch `iter` leaves out; setting `epoch` sets it to 0.

    Raises:
        ConfigError: if there is no process of this rank.
    """

    def __init__(self, batches: Batches, *, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must lie in [0, {world_size}), a number a process; got {rank}")
        self._batches, self._rank, self._world_size = batches, rank, world_size
        self.start = 0

    @property
    def epoch(self) -> int:
        """The number of the epoch that `iter` starts."""
        return self._batches.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._batches.epoch = epoch
        self.start = 0

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        if not 0 <= self.start <= len(self):
            raise ConfigError(f"an epoch has {len(self)} batches; got start {self.start}: is this the same data?")
        rest = islice(iter(self._batches), self.start, None)
        return (share(batch, self._rank, self._world_size) for batch in rest)


def share(batch: Sequence[int], rank: int, world_size: int) -> list[int]:
    """Return the part of a batch that one of several processes gets.

    The parts of all ranks in order are the batch; their sizes differ by one at most.

    Raises:
        ConfigError: if the batch is too small to give every process an image.
    """
    if len(batch) < world_size:
        raise ConfigError(
            f"a batch of {len(batch)} images cannot be shared by {world_size} processes; make batches larger, or "
            "launch fewer processes"
        )
    return list(batch[len(batch) * rank // world_size : len(batch) * (rank + 1) // world_size])


class _Dealer:
    """The images of an epoch, dealt in groups: of each class a hand of its images and a hand of its forgeries.

    Attributes:
        left: (C,) int64, how many groups each class needs to show all that was not dealt yet.
    """

    def __init__(
        self, side: Ints, is_forged: NDArray[np.bool_], sizes: tuple[int, int], rng: np.random.Generator
    ) -> None:
        kinds = zip((~is_forged, is_forged), sizes, strict=True)
        self._is_forged = is_forged
        self._decks = [_Decks(side, is_kind, size, rng) for is_kind, size in kinds]
        self.left: Ints = np.maximum(self._decks[0].hands(), self._decks[1].hands())

    def group(self, label: int, wanted: int = -1) -> list[int]:
        """Deal a group of a class, with an image that is wanted in it; -1 for none."""
        self.left[label] = self.left_after(label, wanted)
        return [image for deck, card in self._each(wanted) for image in deck.deal(label, card)]

    def left_after(self, label: int, wanted: int = -1) -> int:
        """Return how many groups a class will need when it has given one with a wanted image."""
        return max(deck.hands_after(label, card) for deck, card in self._each(wanted))

    def _each(self, wanted: int) -> Iterator[tuple["_Decks", int]]:
        """Yield both decks, each with the wanted image if it is in there."""
        for kind, deck in enumerate(self._decks):
            yield deck, (wanted if wanted >= 0 and self._is_forged[wanted] == kind else -1)


class _Decks:
    """A shuffled deck of cards a class; a card is an image.

    The decks lie one after the other in `_cards`, that of class c from `_bounds[c]` on. Those before `_next[c]` have
    been dealt.
    """

    def __init__(self, side: Ints, is_in: NDArray[np.bool_], size: int, rng: np.random.Generator) -> None:
        shuffled = rng.permutation(np.flatnonzero(is_in))
        self._cards = shuffled[np.argsort(side[shuffled], kind="stable")]
        self._bounds = np.searchsorted(side[self._cards], np.arange(side.max() + 2))
        self._next = self._bounds[:-1].copy()
        self._place = np.full(len(side), -1)  # where each card lies
        self._place[self._cards] = np.arange(len(self._cards))
        self._size = size
        self._rng = rng

    def hands(self) -> Ints:
        """(C,) how many hands each class needs until all its cards are dealt."""
        return -(-(self._bounds[1:] - self._next) // self._size)

    def hands_after(self, label: int, wanted: int) -> int:
        """Return how many a class will need after a hand with a wanted card, or any for -1."""
        is_dealt = wanted >= 0 and self._place[wanted] < self._next[label]
        unseen = self._bounds[label + 1] - self._next[label] - (self._size - is_dealt)
        return max(0, -(-int(unseen) // self._size))

    def deal(self, label: int, wanted: int) -> list[int]:
        """Deal new cards of a class, the wanted one first, and old ones if these are too few for a hand."""
        start, at, end = int(self._bounds[label]), int(self._next[label]), int(self._bounds[label + 1])
        hand: list[int] = []
        if wanted >= 0 and self._place[wanted] >= at:
            self._swap(int(self._place[wanted]), at)
        elif wanted >= 0:
            hand = [wanted]
        self._next[label] = stop = min(end, at + self._size - len(hand))
        hand += self._cards[at:stop].tolist()
        short = min(self._size, end - start) - len(hand)
        if short > 0:
            old = self._cards[start:at]
            hand += self._rng.choice(old[old != wanted], short, replace=False).tolist()
        return hand

    def _swap(self, one: int, two: int) -> None:
        self._cards[[one, two]] = self._cards[[two, one]]
        self._place[self._cards[[one, two]]] = [one, two]


def _forgeries_with_writer(labels: Ints, forgery_of: Ints | None) -> NDArray[np.bool_]:
    """(N,) which images imitate a class that has images here."""
    if forgery_of is None:
        return np.zeros(len(labels), dtype=np.bool_)
    if forgery_of.shape != labels.shape:
        raise DataError(f"expected forgery_of for each of the {len(labels)} images; got {forgery_of.shape}")
    is_forged = forgery_of >= 0
    shared = np.intersect1d(labels[~is_forged], labels[is_forged])
    if len(shared) or len(np.unique(labels[is_forged])) < np.count_nonzero(is_forged):
        raise DataError("each forgery must be a class of its own; some share a label with another image")
    return is_forged & np.isin(forgery_of, labels[~is_forged])


def _category_of_classes(side: Ints, is_genuine: NDArray[np.bool_], categories: Ints) -> Ints:
    """(C,) the category of each class, numbered anew; a forgery is of that of the writer beside whom it comes."""
    if categories.shape != side.shape or categories.dtype.kind not in "iu":
        got = f"{categories.dtype} of shape {categories.shape}"
        raise DataError(f"expected whole numbers of shape ({len(side)},), the category of each image; got {got}")
    found = np.full(side.max() + 1, -1)
    found[side[is_genuine]] = categories[is_genuine]
    if (found[side] != categories)[is_genuine].any():
        raise DataError("all images of a class must be of one category; those of some class are of several")
    numbers: Ints = np.unique(found, return_inverse=True)[1]
    return numbers


def _largest(values: NDArray[np.float64], count: int) -> Ints:
    """Return the positions of the largest values, in falling order."""
    count = min(count, len(values))
    found = np.argpartition(-values, count - 1)[:count]
    return found[np.argsort(-values[found])]
