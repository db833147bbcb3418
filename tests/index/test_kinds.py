"""RaBitQ codes: written here, read by faiss."""

import faiss
import numpy as np
import pytest

from lib.errors import RunError
from lib.index.build.codec import Coder, fill, rotate
from lib.index.build.train import set_centroids
from lib.index.kinds import Metric, empty_index, faiss_codes, ivf_rabitq, lists_of, parse
from tests.support.indexed import clustered

LISTS, ROWS = 16, 3000


def trained(bits: int, metric: Metric, vectors: np.ndarray) -> faiss.Index:
    index = empty_index(parse(f"ivf-rabitq:bits={bits}"), vectors.shape[1], LISTS, metric)
    faiss.downcast_VectorTransform(index.chain.at(0)).train(vectors)
    set_centroids(index, vectors[:LISTS])
    index.is_trained = lists_of(index).is_trained = True
    return index


def both(bits: int, metric: Metric, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, ours and faiss's."""
    index = trained(bits, metric, vectors)
    lists, codes = Coder(parse(f"ivf-rabitq:bits={bits}"), index).encode(vectors)
    return codes, faiss_codes(lists_of(index), rotate(index, vectors), lists)


def score_error(index: faiss.Index, vectors: np.ndarray, queries: np.ndarray) -> float:
    """The mean squared error of the scores of all vectors, with every list probed."""
    faiss.ParameterSpace().set_index_parameter(index, "nprobe", LISTS)
    scores, numbers = index.search(queries, len(vectors))
    products = np.einsum("qd,qnd->qn", queries, vectors[numbers])
    distances = np.sum(queries**2, 1)[:, None] - 2 * products + np.sum(vectors**2, 1)[numbers]
    return float(np.mean((scores - (products if index.metric_type == faiss.METRIC_INNER_PRODUCT else distances)) ** 2))


@pytest.mark.parametrize("metric", ["cosine", "ip"])
@pytest.mark.parametrize("dim", [64, 37])
def test_codes_of_one_bit_are_those_of_faiss(metric, dim):
    """Every byte of a 1-bit code equals faiss's; of codes with more bits the signs and their factors do."""
    vectors = clustered(ROWS, dim=dim)
    mine, wanted = both(1, metric, vectors)
    assert np.array_equal(mine, wanted)
    for bits in (2, 3, 4):
        mine, wanted = both(bits, metric, vectors)
        signs = -(-dim // 8) + 12
        assert mine.shape == wanted.shape
        assert np.array_equal(mine[:, :signs], wanted[:, :signs])


@pytest.mark.parametrize("metric", ["cosine", "ip"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [256, 37])
def test_codes_of_more_bits_are_as_precise_as_those_of_faiss(metric, bits, dim):
    """The scores that faiss reads from codes of 2 to 4 bits are at most 2 % farther off than those it reads from its own."""
    vectors, queries = clustered(ROWS, dim=dim), clustered(20, dim=dim, seed=5)
    kind, numbers = parse(f"ivf-rabitq:bits={bits}"), np.arange(ROWS, dtype=np.int64)
    mine, theirs = (trained(bits, metric, vectors) for _ in range(2))
    fill(kind, mine, numbers, *Coder(kind, mine).encode(vectors))
    theirs.add_with_ids(vectors, numbers)

    assert score_error(mine, vectors, queries) <= 1.02 * score_error(theirs, vectors, queries)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_vector_on_its_centroid_has_distance_zero(bits):
    """The residual of a vector on its centroid has no length and no direction: a search returns the vector at distance 0."""
    vectors = clustered(ROWS, dim=64)
    kind, index, centroids = parse(f"ivf-rabitq:bits={bits}"), trained(bits, "l2", vectors), vectors[:LISTS]
    lists, codes = Coder(kind, index).encode(centroids)
    fill(kind, index, np.arange(LISTS, dtype=np.int64), lists, codes)
    scores, numbers = index.search(centroids, 1)

    assert np.array_equal(numbers[:, 0], np.arange(LISTS))
    np.testing.assert_allclose(scores[:, 0], 0, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 4])
def test_a_code_does_not_depend_on_the_batch(bits):
    """The bytes of a code are those of its vector alone: another cut of the shards, or a retry, gives the same."""
    vectors = clustered(300, dim=100)
    kind, inner = parse(f"ivf-rabitq:bits={bits}"), lists_of(trained(bits, "cosine", vectors))
    lists = np.arange(len(vectors)) % LISTS
    codes = kind.codes(inner, vectors, lists)
    for start, stop in ((0, 1), (7, 9), (255, 258), (299, 300)):
        assert np.array_equal(kind.codes(inner, vectors[start:stop], lists[start:stop]), codes[start:stop])


def test_queries_are_rounded_to_eight_bits(tmp_path):
    """In the file that any faiss reads, and with the parameters of our search: the same scores, more precise than with 4 bits."""
    vectors, queries = clustered(ROWS, dim=64), clustered(20, dim=64, seed=5)
    kind, index = parse("ivf-rabitq:bits=1"), trained(1, "cosine", vectors)
    fill(kind, index, np.arange(ROWS, dtype=np.int64), *Coder(kind, index).encode(vectors))
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    index = faiss.read_index(str(tmp_path / "index.faiss"))
    scores, _ = index.search(queries, 10, params=kind.parameters(nprobe=LISTS))
    error = score_error(index, vectors, queries)
    assert np.array_equal(index.search(queries, 10)[0], scores)

    lists_of(index).qb = 4
    assert error < 0.98 * score_error(index, vectors, queries)


def swapped_factors(code):
    """Codes of the same length with the first two factors exchanged."""

    def changed(points, *more):
        codes = code(points, *more)
        signs = -(-points.shape[1] // 8)
        order = [
            *range(signs),
            *range(signs + 4, signs + 8),
            *range(signs, signs + 4),
            *range(signs + 8, codes.shape[1]),
        ]
        return codes[:, order]

    return changed


def reversed_levels(code):
    """Codes of the same length with the bytes of the levels in reverse order."""

    def changed(points, *more):
        codes = code(points, *more)
        levels = slice(-(-points.shape[1] // 8) + 12, codes.shape[1] - 8)
        codes[:, levels] = codes[:, levels][:, ::-1].copy()
        return codes

    return changed


def longer(code):
    """Codes with a byte more."""
    return lambda *words: np.pad(code(*words), [(0, 0), (0, 1)])


@pytest.fixture
def unchecked():
    """No layout was checked before in this process, and none stays checked."""
    ivf_rabitq.check_layout.cache_clear()
    yield
    ivf_rabitq.check_layout.cache_clear()


@pytest.mark.parametrize("metric", ["cosine", "ip"])
@pytest.mark.parametrize(
    ("change", "bits"),
    [(swapped_factors, 1), (swapped_factors, 4), (reversed_levels, 2), (reversed_levels, 4), (longer, 1), (longer, 3)],
)
def test_a_layout_that_faiss_does_not_read_is_refused(change, bits, metric, unchecked, monkeypatch):
    """Codes are not written where faiss lays them out otherwise; the error names both versions and the ways out."""
    vectors = clustered(300, dim=64)
    kind, index = parse(f"ivf-rabitq:bits={bits}"), trained(bits, metric, vectors)
    kind.codes(lists_of(index), vectors, np.zeros(len(vectors), np.int64))
    ivf_rabitq.check_layout.cache_clear()
    monkeypatch.setattr(ivf_rabitq, "code", change(ivf_rabitq.code))
    wanted = f"faiss {faiss.__version__} .* as faiss {ivf_rabitq.TESTED_FAISS} .*faiss-cpu==.*--kind ivf-sq8"
    with pytest.raises(RunError, match=wanted):
        Coder(kind, index).encode(vectors)


def test_a_layout_is_checked_once_in_a_process(unchecked, monkeypatch):
    """The second batch of vectors is encoded without another comparison."""
    calls, own = [], ivf_rabitq.faiss_codes
    monkeypatch.setattr(ivf_rabitq, "faiss_codes", lambda *words: calls.append(words) or own(*words))
    vectors = clustered(300, dim=64)
    coder = Coder(parse("ivf-rabitq:bits=2"), trained(2, "cosine", vectors))
    for _ in range(2):
        coder.encode(vectors)

    assert len(calls) == 1
