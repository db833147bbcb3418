"""log_partition and l2_normalise equal torch's own functions, with the gradients of these."""

from functools import partial

import pytest
import torch

from lib.training.losses.tiled_logsumexp import ExcludedPairs, l2_normalise, log_partition
from tests.support.loss_cases import EXACT, ROWS, assert_same, random_case, unit


@pytest.mark.parametrize("tile", [1, 3, 5, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("hardness", [0.0, 9.0])
def test_log_partition_is_logsumexp(tile, masked, hardness):
    """Value and gradients must equal the full matrix's at scale 100, for tiles smaller than the matrix, without exclusion or with two
    keys a column and a ceiling."""
    case = random_case(duplicates=False)
    rows, columns = (
        unit(case.queries.detach()).requires_grad_(),
        unit(case.passages.detach()).flatten(0, 1).requires_grad_(),
    )
    scale = torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
    products = rows @ columns.T
    random = torch.Generator().manual_seed(1)
    row_keys, column_keys = (torch.randint(0, 12, (n, 2), generator=random) for n in products.shape)
    ceiling = products.detach().quantile(0.8, dim=1)
    excluded = (row_keys[:, None, :, None] == column_keys[None, :, None, :]).flatten(2).any(2) | (
        products > ceiling[:, None]
    )
    logits = scale * products + hardness * products.detach()
    expected = (logits.masked_fill(excluded, float("-inf")) if masked else logits).logsumexp(1)
    pairs = ExcludedPairs(row_keys, column_keys, ceiling) if masked else None
    actual = log_partition(rows, columns, scale, pairs, hardness, tile)
    upstream = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    assert_same((actual * upstream).sum(), (expected * upstream).sum(), [rows, columns, scale], **EXACT)
    torch.testing.assert_close(actual, expected, **EXACT)


def test_log_partition_passes_gradcheck():
    """Gradients must equal numeric differences, with exclusion and in tiles."""
    case = random_case()
    rows, columns = case.queries.detach().requires_grad_(), case.passages.detach().flatten(0, 1).requires_grad_()
    excluded = ExcludedPairs(case.keys.positive_keys, case.keys.passage_keys.flatten())
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    function = partial(log_partition, excluded=excluded, tile=5)
    assert torch.autograd.gradcheck(function, (rows, columns, scale))


def test_log_partition_of_no_columns():
    """A row whose columns are all excluded must be -inf, without gradient or NaN, and not change the other rows."""
    case = random_case(duplicates=False)
    rows, columns = case.queries.detach().requires_grad_(), case.passages.detach().flatten(0, 1).requires_grad_()
    scale = torch.tensor(50.0, dtype=torch.float64, requires_grad=True)
    keys = torch.zeros(ROWS, 1, dtype=torch.int64)
    keys[1:] = 7
    actual = log_partition(
        rows, columns, scale, ExcludedPairs(keys, torch.zeros(len(columns), dtype=torch.int64)), tile=5
    )
    assert actual[0].isneginf()
    assert actual[1:].isfinite().all()
    value = torch.nn.functional.softplus(actual - 1).sum()
    expected = torch.nn.functional.softplus((scale * rows[1:] @ columns.T).logsumexp(1) - 1).sum()
    assert_same(value, expected, [rows, columns, scale], **EXACT)
    assert not torch.autograd.grad(value, rows)[0][0].any()


def test_log_partition_ignores_autocast():
    """Under autocast the forward and backward passes must compute the same tiles, in float32."""
    case = random_case(dtype=torch.float32)
    leaves = [case.queries, case.passages]
    function = partial(log_partition, case.queries, case.passages.flatten(0, 1), torch.tensor(50.0))
    with torch.autocast("cpu", torch.bfloat16):
        actual = function().sum()
    assert_same(actual, function().sum(), leaves, **EXACT)


def test_l2_normalise_is_normalize():
    """Value and gradients must equal torch's normalize, for [n, d] with a zero vector and for [n, g, d] that is not contiguous."""
    case = random_case()
    queries = case.queries.detach().index_fill(0, torch.tensor(2), 0.0).requires_grad_()
    random = torch.Generator().manual_seed(1)
    for leaf in (queries, case.passages):
        vectors = leaf.transpose(0, -2)[..., :4]
        upstream = torch.randn(vectors.shape, generator=random, dtype=torch.float64)
        expected = (torch.nn.functional.normalize(vectors, dim=-1) * upstream).sum()
        assert_same((l2_normalise(vectors) * upstream).sum(), expected, [leaf], **EXACT)
    assert torch.autograd.gradcheck(l2_normalise, case.passages)
