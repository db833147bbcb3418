"""The codes of RaBitQ that are made here, read by faiss."""

import faiss
import numpy as np
import pytest

from lib.index.build.codec import Coder, fill, rotate
from lib.index.build.train import give_centroids
from lib.index.kinds import Metric, empty_index, faiss_codes, lists_of, parse
from tests.support.indexed import clustered

LISTS, ROWS = 16, 3000


def trained(bits: int, metric: Metric, vectors: np.ndarray) -> faiss.Index:
    index = empty_index(parse(f"ivf-rabitq:bits={bits}"), vectors.shape[1], LISTS, metric)
    faiss.downcast_VectorTransform(index.chain.at(0)).train(vectors)
    give_centroids(index, vectors[:LISTS])
    index.is_trained = lists_of(index).is_trained = True
    return index


def both(bits: int, metric: Metric, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, ours and faiss's."""
    index = trained(bits, metric, vectors)
    lists, codes = Coder(parse(f"ivf-rabitq:bits={bits}"), index).encode(vectors)
    return codes, faiss_codes(lists_of(index), rotate(index, vectors), lists)


def off(index: faiss.Index, vectors: np.ndarray, queries: np.ndarray) -> float:
    """The mean squared error of the scores of all vectors, every list looked into."""
    faiss.ParameterSpace().set_index_parameter(index, "nprobe", LISTS)
    scores, numbers = index.search(queries, len(vectors))
    products = np.einsum("qd,qnd->qn", queries, vectors[numbers])
    distances = np.sum(queries**2, 1)[:, None] - 2 * products + np.sum(vectors**2, 1)[numbers]
    return float(np.mean((scores - (products if index.metric_type == faiss.METRIC_INNER_PRODUCT else distances)) ** 2))


@pytest.mark.parametrize("metric", ["cosine", "ip"])
@pytest.mark.parametrize("dim", [64, 37])
def test_codes_of_one_bit_are_those_of_faiss(metric, dim):
    """Every byte of a code of 1 bit is faiss's own; of more bits the signs and their factors are."""
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
def test_codes_of_more_bits_say_at_least_as_much_as_those_of_faiss(metric, bits, dim):
    """The scores that faiss reads from codes of 2 to 4 bits are at most 2 % farther off than those it reads from its own."""
    vectors, queries = clustered(ROWS, dim=dim), clustered(20, dim=dim, seed=5)
    kind, numbers = parse(f"ivf-rabitq:bits={bits}"), np.arange(ROWS, dtype=np.int64)
    mine, theirs = (trained(bits, metric, vectors) for _ in range(2))
    fill(kind, mine, numbers, *Coder(kind, mine).encode(vectors))
    theirs.add_with_ids(vectors, numbers)

    assert off(mine, vectors, queries) <= 1.02 * off(theirs, vectors, queries)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_vector_on_its_centroid_is_found_at_its_distance(bits):
    """What is left of a vector on its centroid is nothing, which has no direction: it is found all the same, at no distance."""
    vectors = clustered(ROWS, dim=64)
    kind, index, centroids = parse(f"ivf-rabitq:bits={bits}"), trained(bits, "l2", vectors), vectors[:LISTS]
    lists, codes = Coder(kind, index).encode(centroids)
    fill(kind, index, np.arange(LISTS, dtype=np.int64), lists, codes)
    scores, numbers = index.search(centroids, 1)

    assert np.array_equal(numbers[:, 0], np.arange(LISTS))
    np.testing.assert_allclose(scores[:, 0], 0, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 4])
def test_a_code_is_the_same_whatever_is_coded_with_it(bits):
    """The bytes of a code are those of its vector alone: a shard that is cut otherwise, or done again, has the same."""
    vectors = clustered(300, dim=100)
    kind, inner = parse(f"ivf-rabitq:bits={bits}"), lists_of(trained(bits, "cosine", vectors))
    lists = np.arange(len(vectors)) % LISTS
    codes = kind.codes(inner, vectors, lists)
    for start, stop in ((0, 1), (7, 9), (255, 258), (299, 300)):
        assert np.array_equal(kind.codes(inner, vectors[start:stop], lists[start:stop]), codes[start:stop])


def test_queries_are_rounded_to_eight_bits_wherever_they_are_asked(tmp_path):
    """In the file that any faiss reads, and with the parameters of our search: the same scores, nearer than with 4."""
    vectors, queries = clustered(ROWS, dim=64), clustered(20, dim=64, seed=5)
    kind, index = parse("ivf-rabitq:bits=1"), trained(1, "cosine", vectors)
    fill(kind, index, np.arange(ROWS, dtype=np.int64), *Coder(kind, index).encode(vectors))
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    index = faiss.read_index(str(tmp_path / "index.faiss"))
    scores, _ = index.search(queries, 10, params=kind.parameters(nprobe=LISTS))
    error = off(index, vectors, queries)
    assert np.array_equal(index.search(queries, 10)[0], scores)

    lists_of(index).qb = 4
    assert error < 0.98 * off(index, vectors, queries)
