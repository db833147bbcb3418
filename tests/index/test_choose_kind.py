"""Which kind of index, with how many lists and how much effort: what was asked for, or what memory and the wanted recall allow."""

import pytest

from lib.cli.units import parse_bytes
from lib.errors import UsageError
from lib.index.build.card import _advice
from lib.index.build.choose_kind import choose, default_lists, size_of
from lib.index.build.recall import Measured, enough
from lib.index.kinds import ID_BYTES, names, parse, search_parameter_values, to_spec
from tests.support.indexed import DIM, built, clustered, write_many

ROWS = 3000


def test_advice_is_the_least_effort_that_is_enough():
    """The first with the recall that was asked for; where none has it, the first that comes near the most there is, and the
    most is what the card tells."""

    def rows(*recalls: float) -> list[Measured]:
        return [Measured(2**place, {10: (recall, 0, 1)}, 0.0) for place, recall in enumerate(recalls)]

    assert enough(rows(0.5, 0.8975, 0.902, 0.95), 0.9).effort == 4
    assert enough(rows(0.5, 0.8975, 0.902), 0.9).effort == 4
    assert enough(rows(0.5, 0.79, 0.8), 0.9).effort == 4
    assert enough(rows(0.5, 0.797, 0.8), 0.9).effort == 2
    assert _advice(rows(0.5, 0.8975, 0.902), 0.9) == []
    assert "0.8000 at most" in _advice(rows(0.5, 0.797, 0.8), 0.9)[0]


def test_auto_keeps_to_memory_and_recall():
    """The smallest kind that is expected to reach the recall, else the most precise that fits, with that said."""
    million = 1_000_000

    def pick(memory: str | None, recall: float) -> str:
        return to_spec(choose("auto", None, million, 1024, memory, recall).kind)

    assert to_spec(choose("auto", None, 5000, 1024, None, 0.9).kind) == "flat"
    assert pick(None, 0.9) == "ivf-rabitq:bits=4"
    assert pick(None, 0.95) == "ivf-sq8"
    assert pick(None, 0.5) == "ivf-rabitq:bits=1"
    assert pick("310MB", 0.9) == "ivf-rabitq:bits=2"
    why = choose("auto", None, million, 1024, "310MB", 0.9).why
    assert "most precise that fits" in why[0]
    assert "0.9 is not to be expected" in why[1]
    for text in ("310MB", "700MB"):
        choice = choose("auto", None, million, 1024, text, 0.9)
        assert choice.bytes <= parse_bytes(text)


def test_the_size_that_is_said_is_the_size_that_is_built(tmp_path):
    """The estimate of memory is within 15 % of the files for every kind, codebooks and rotations of a fixed size apart."""
    source = write_many(tmp_path / "vectors", clustered(ROWS))
    for name in names():
        card = built(source, tmp_path / name, kind=name)
        wanted = size_of(parse(name), card["lists"], ROWS, DIM)

        assert wanted == pytest.approx(card["bytes"], rel=0.15, abs=4 * DIM * (256 + DIM) + 2000), name


def test_lists_grow_with_the_root_of_the_rows():
    """Powers of two near 4 roots of the rows, fewer where the rows could not train them."""
    assert [default_lists(rows) for rows in (1, 1000, 2e6, 1e9)] == [1, 16, 4096, 131_072]


def test_efforts_are_a_ladder_to_an_eighth_of_the_lists():
    """nprobe in powers of two; few lists are probed all."""
    assert search_parameter_values(parse("ivf-flat"), 16) == (1, 2, 4, 8, 16)
    assert search_parameter_values(parse("ivf-flat"), 4096)[-1] == 512
    assert search_parameter_values(parse("hnsw"), 0) == (16, 32, 64, 128, 256, 512)


def test_kinds_name_themselves():
    """Every kind is parsed from its own description."""
    for name in names():
        assert parse(to_spec(parse(name))) == parse(name)


def test_memory_counts_the_centroids_of_every_piece():
    """Of 1e9 x 1024 they are a third. --memory refuses what does not fit with them, and tells what --merge would take."""
    words = ("ivf-rabitq", None, 1e9, 1024)
    whole, merged = choose(*words, None, 0.9).bytes, choose(*words, None, 0.9, merge=1).bytes

    assert merged == pytest.approx(1e9 * (1024 / 2 + 20 + ID_BYTES), rel=0.03)
    assert whole > 1.4 * merged
    with pytest.raises(
        UsageError, match=r"takes 7\d\d GiB, over --memory 520GiB.*--merge 1, with which it takes 503 GiB"
    ):
        choose(*words, "520GiB", 0.9)
    assert choose(*words, "520GiB", 0.9, merge=1).bytes < parse_bytes("520GiB")


@pytest.mark.parametrize("text", ["1.2.3GB", ".", "", "GB", "-1GB", "1e3"])
def test_sizes_that_are_none(text):
    """A wrong --memory is named."""
    with pytest.raises(UsageError, match=r"is no size. Write it as 64GB"):
        parse_bytes(text)


def test_a_large_graph_is_warned_of():
    """hnsw of more vectors than a graph is for is built as asked, with that said."""
    assert any("an ivf kind is for so many" in why for why in choose("hnsw", None, 1e9, DIM, None, 0.9).why)
    assert len(choose("hnsw", None, 1e6, DIM, None, 0.9).why) == 1


@pytest.mark.parametrize(
    ("kind", "dim", "size"),
    [("ivf-pq", 384, 48), ("ivf-pq", 100, 10), ("ivf-opq", 300, 30), ("ivf-pq-fastscan", 100, 10)],
)
def test_product_quantizers_take_groups_that_divide(kind, dim, size):
    """By default as many as there may be with 8 dimensions a byte, or a few more where the dimensions do not divide so."""
    parse(kind).check(dim)
    assert parse(kind).bytes(dim) == size


@pytest.mark.parametrize(
    ("kind", "dim", "words"),
    [
        ("ivf-pq", 101, "--kind ivf-pq:code=1: it must divide the vectors' 101 dimensions, as 101 do"),
        (
            "ivf-opq:code=7",
            12,
            "--kind ivf-opq:code=7: it must divide the vectors' 12 dimensions, as 1, 2, 3, 4, 6, 12 do",
        ),
        (
            "ivf-pq-fastscan",
            25,
            "--kind ivf-pq-fastscan:groups=1: it must be even, .* as none do. ivf-rabitq takes any",
        ),
        ("ivf-pq-fastscan:groups=3", 12, "groups=3: it must be even, .* as 2, 4, 6, 12 do"),
    ],
)
def test_groups_that_do_not_divide(kind, dim, words):
    """The kind that was asked for is named, and what divides."""
    with pytest.raises(UsageError, match=words):
        parse(kind).check(dim)
