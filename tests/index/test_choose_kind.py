"""The choice of a kind, its lists and its search parameter: as requested, or by memory and the wanted recall."""

import pytest

from lib.cli.units import parse_bytes
from lib.errors import UsageError
from lib.index.build.card import _advice
from lib.index.build.choose_kind import choose, default_lists, size_of
from lib.index.build.recall import RecallPoint, advised_point
from lib.index.kinds import ID_BYTES, names, parse, search_parameter_values, to_spec
from tests.support.indexed import DIM, built, clustered, write_many

ROWS = 3000


def test_advice_is_the_least_parameter_with_enough_recall():
    """The first value with the wanted recall; where none has it, the first near the best recall, and the card names the best."""

    def rows(*recalls: float) -> list[RecallPoint]:
        return [RecallPoint(2**place, {10: (recall, 0, 1)}, 0.0) for place, recall in enumerate(recalls)]

    assert advised_point(rows(0.5, 0.8975, 0.902, 0.95), 0.9).value == 4
    assert advised_point(rows(0.5, 0.8975, 0.902), 0.9).value == 4
    assert advised_point(rows(0.5, 0.79, 0.8), 0.9).value == 4
    assert advised_point(rows(0.5, 0.797, 0.8), 0.9).value == 2
    assert _advice(rows(0.5, 0.8975, 0.902), 0.9) == []
    assert "0.8000 at most" in _advice(rows(0.5, 0.797, 0.8), 0.9)[0]


def test_auto_keeps_to_memory_and_recall():
    """The smallest kind expected to reach the recall; else the most precise that fits, with a note."""
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


def test_the_estimated_size_is_the_size_of_the_files(tmp_path):
    """The estimate of memory is within 15 % of the files for every kind, codebooks and rotations of a fixed size apart."""
    source = write_many(tmp_path / "vectors", clustered(ROWS))
    for name in names():
        card = built(source, tmp_path / name, kind=name)
        wanted = size_of(parse(name), card["lists"], ROWS, DIM)

        assert wanted == pytest.approx(card["bytes"], rel=0.15, abs=4 * DIM * (256 + DIM) + 2000), name


def test_lists_grow_with_the_root_of_the_rows():
    """Powers of two near 4 roots of the rows, fewer where the rows could not train them."""
    assert [default_lists(rows) for rows in (1, 1000, 2e6, 1e9)] == [1, 16, 4096, 131_072]


def test_search_parameters_go_to_an_eighth_of_the_lists():
    """nprobe in powers of two; where there are few lists, to all of them."""
    assert search_parameter_values(parse("ivf-flat"), 16) == (1, 2, 4, 8, 16)
    assert search_parameter_values(parse("ivf-flat"), 4096)[-1] == 512
    assert search_parameter_values(parse("hnsw"), 0) == (16, 32, 64, 128, 256, 512)


def test_kinds_name_themselves():
    """Every kind is parsed from its own text."""
    for name in names():
        assert parse(to_spec(parse(name))) == parse(name)


def test_memory_counts_the_centroids_of_every_segment():
    """For 1e9 x 1024 they are a third. --memory refuses an index that is too large with them, and names the size with --merge."""
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
def test_texts_that_are_no_size(text):
    """A wrong --memory is named."""
    with pytest.raises(UsageError, match=r"is no size. Write it as 64GB"):
        parse_bytes(text)


def test_a_large_graph_has_a_warning():
    """hnsw of more vectors than a graph suits is allowed, with a warning."""
    assert any("an ivf kind is for so many" in why for why in choose("hnsw", None, 1e9, DIM, None, 0.9).why)
    assert len(choose("hnsw", None, 1e6, DIM, None, 0.9).why) == 1


@pytest.mark.parametrize(
    ("kind", "dim", "size"),
    [("ivf-pq", 384, 48), ("ivf-pq", 100, 10), ("ivf-opq", 300, 30), ("ivf-pq-fastscan", 100, 10)],
)
def test_product_quantizers_take_groups_that_divide(kind, dim, size):
    """By default a byte for 8 dimensions, or for a few more where 8 do not divide them."""
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
    """The error names the requested kind and the divisors."""
    with pytest.raises(UsageError, match=words):
        parse(kind).check(dim)
