"""Rerankers against plain transformers, on a thousand pairs. Run by `make scale`."""

import pytest

from tests.models import test_reranker
from tests.models.test_reranker import CLASSIFIERS, LANGUAGE_MODELS

build = test_reranker.build  # fixture


@pytest.mark.parametrize("kind", [*CLASSIFIERS, *LANGUAGE_MODELS])
def test_a_thousand_pairs_equal_plain_transformers(kind, build):
    """1,000 pairs of mixed length have plain transformers' scores within 1e-4, in the best mode of the kind."""
    test_reranker.test_pairs_equal_plain_transformers(kind, 1000, build)
