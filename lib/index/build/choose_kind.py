"""The choice of the kind and its number of lists: by the command, or by memory and the wanted recall; with the reasons."""

import math
from dataclasses import dataclass

from ...cli.units import format_bytes, parse_bytes
from ...errors import UsageError
from ..kinds import FLAT_LISTS, GRAPH, ID_BYTES, IndexKind, parse, to_spec
from .segments import segments_for
from .train import MIN_CODEC_ROWS, MIN_POINTS, POINTS

AUTO = "auto"
# Smallest first. Of two with the same recall the smaller is also the quicker.
CANDIDATES = (*(f"ivf-rabitq:bits={bits}" for bits in (1, 2, 3, 4)), "ivf-sq8", "ivf-flat")
EXACT_ROWS = 20_000  # up to which exact search of a query takes a millisecond, and an index wins nothing
LISTS_FACTOR = 4  # lists over the square root of the vectors, before rounding to a power of two
LARGE_GRAPH = 10_000_000  # vectors; for more a warning says that a graph is no kind for so many


@dataclass(frozen=True)
class IndexPlan:
    """A kind, and its number of lists, 0 for a kind without. why: sentences. bytes: of the whole index in memory."""

    kind: IndexKind
    lists: int
    why: tuple[str, ...]
    bytes: float


def choose(
    text: str, lists: int | None, rows: float, dim: int, memory: str | None, recall: float, merge: int | None = None
) -> IndexPlan:
    """Choose by the options of a build. Raises UsageError for what cannot be.

    text: --kind. rows: vectors of the input. merge: indexes that the segments are merged into.
    """
    limit = parse_bytes(memory) if memory else math.inf
    if text != AUTO:
        kind = parse(text)
        why = [f"{to_spec(kind)}: as asked", *_warning(kind, rows)]
    else:
        kind, why = _pick(rows, dim, limit, recall, merge)
    kind.check(dim)
    count, reasons = _lists(kind, lists, rows)
    size, one = (size_of(kind, count, rows, dim, indexes) for indexes in (merge, 1))
    if size > limit:
        merged = kind.mergeable and one < size and one <= limit
        repeated = f", or give --merge 1, with which it takes {format_bytes(one)}" if merged else ""
        raise UsageError(
            f"{to_spec(kind)} of {rows:,.0f} vectors of {dim} dimensions takes {format_bytes(size)}, over --memory {memory}. Raise "
            f"it to {format_bytes(size)}, or let --kind auto choose{repeated}"
        )
    return IndexPlan(kind, count, (*why, *reasons), size)


def size_of(kind: IndexKind, lists: int, rows: float, dim: int, merge: int | None = None) -> float:
    """Bytes of an index in memory: codes and numbers; and in each segment, or in each of `merge` merged indexes, centroids and
    their links."""
    codes = rows * (kind.bytes(dim) + ID_BYTES)
    repeated = 4.0 * lists * dim + (lists * 8.0 * GRAPH if lists > FLAT_LISTS else 0.0)
    return codes + (merge or segments_for(codes, repeated)) * repeated


def _warning(kind: IndexKind, rows: float) -> list[str]:
    if kind.has_lists or not kind.search_parameter or rows <= LARGE_GRAPH:
        return []
    return [f"a graph of {rows:,.0f} vectors takes days to build and all of them in memory: an ivf kind is for so many"]


def _pick(rows: float, dim: int, memory: float, recall: float, merge: int | None) -> tuple[IndexKind, list[str]]:
    if rows <= EXACT_ROWS and size_of(parse("flat"), 0, rows, dim) <= memory:
        return parse("flat"), [f"flat: exact search of {rows:,.0f} vectors takes about a millisecond"]
    sizes = {parse(name): size_of(parse(name), default_lists(rows), rows, dim, merge) for name in CANDIDATES}
    fitting = [kind for kind, size in sizes.items() if size <= memory]
    if not fitting:
        small, least = next(iter(sizes.items()))
        raise UsageError(
            f"{rows:,.0f} vectors of {dim} dimensions take {format_bytes(least)} at least ({to_spec(small)}). Raise --memory, cut "
            "the dimensions (embed with --truncate-dim), or build several indexes"
        )
    kind = next((each for each in fitting if each.recall >= recall), max(fitting, key=lambda each: each.recall))
    size = format_bytes(sizes[kind])
    if kind.recall >= recall:
        reached = f"expected to reach recall@10 {recall:g} (about {kind.recall:g})"
        return kind, [f"{to_spec(kind)}: the smallest ({size}) that is {reached}"]
    return kind, [
        f"{to_spec(kind)}: the most precise that fits {format_bytes(memory)} ({size})",
        f"recall@10 {recall:g} is not to be expected of it: about {kind.recall:g}. More memory, or rerank more candidates",
    ]


def default_lists(rows: float) -> int:
    """A power of two near LISTS_FACTOR times the square root, and no more than the vectors can train."""
    wanted = 2 ** round(math.log2(max(1.0, LISTS_FACTOR * math.sqrt(rows))))
    trained = 2 ** int(math.log2(max(1.0, rows / POINTS)))
    return max(1, min(wanted, trained))


def _lists(kind: IndexKind, requested: int | None, rows: float) -> tuple[int, list[str]]:
    if not kind.has_lists:
        if requested:
            raise UsageError(f"--lists {requested}: {to_spec(kind)} has no lists. Leave it out, or choose an ivf kind")
        return 0, []
    if rows < MIN_CODEC_ROWS:
        few = f"{rows:,.0f} vectors are too few to train {to_spec(kind)}"
        raise UsageError(f"{few}, which takes {MIN_CODEC_ROWS} at least. Use --kind flat")
    if requested is None:
        count = default_lists(rows)
        return count, [f"{count:,} lists: near {LISTS_FACTOR} times the square root of {rows:,.0f} vectors"]
    if requested * MIN_POINTS > rows:
        raise UsageError(
            f"--lists {requested:,} takes {requested * MIN_POINTS:,} vectors to train ({MIN_POINTS} a list), and there are "
            f"{rows:,.0f}. Ask for {max(1, int(rows / MIN_POINTS)):,} at most, or leave it out ({default_lists(rows):,})"
        )
    return requested, [f"{requested:,} lists: as asked"]
