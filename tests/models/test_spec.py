"""ModelSpec: the cost of a token."""

import pytest

from lib.models.spec import flops_per_token
from lib.models.spec_reader import read_spec
from tests.support.reference import minilm


def test_flops_of_minilm() -> None:
    """MiniLM needs 21.2 million FLOP a token for the matrices and 9,216 for each token that it attends to."""
    spec = read_spec(str(minilm()))

    assert flops_per_token(spec, 0) == pytest.approx(21.2e6, rel=0.01)
    assert flops_per_token(spec, 100) - flops_per_token(spec, 0) == 921_600
