"""read_spec: the values of a model's files, and overrides that the model does not allow."""

import dataclasses
import json
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from lib.errors import ModelError
from lib.models.spec_reader import read_spec
from lib.recipes import Recipe
from tests.support.reference import LONG, vectors


def test_reading_a_spec_loads_neither_torch_nor_transformers(build: Any) -> None:
    """Reading a spec imports neither torch nor transformers; the spec pickles and converts to JSON."""
    code = "import sys; from lib.models.spec_reader import read_spec; read_spec(sys.argv[1])"
    code += "; print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    process = subprocess.run(
        [sys.executable, "-c", code, str(build("bert"))], capture_output=True, text=True, check=True
    )
    spec = read_spec(str(build("bert")))

    assert process.stdout.strip() == "set()"
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert json.loads(json.dumps(dataclasses.asdict(spec)))["pooling"] == ["mean"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_tokens": 129}, "1 to 128"),
        ({"max_tokens": 0}, "1 to 128"),
        ({"truncate_dim": 8}, "is_matryoshka"),
        ({"truncate_dim": 33}, "1 to 32"),
        ({"pooling": "average"}, "Choose from cls"),
    ],
)
def test_impossible_overrides_are_refused(overrides: dict[str, Any], message: str, build: Any) -> None:
    """An override that the model does not allow raises ModelError with the choices."""
    with pytest.raises(ModelError, match=message):
        vectors(build("bert"), [LONG], **overrides)


def test_roberta_positions_beyond_padding_are_counted(build: Any) -> None:
    """A RoBERTa with a table of 130 positions takes 128 tokens, and not one more."""
    assert read_spec(str(build("roberta")), Recipe(max_tokens=128)).max_tokens == 128
    with pytest.raises(ModelError, match="1 to 128"):
        read_spec(str(build("roberta")), Recipe(max_tokens=129))
    longest = vectors(build("roberta"), [LONG * 3], max_tokens=128)
    assert np.isfinite(longest).all()
