"""The fingerprint of settings: the same for equal values everywhere, another for any other value."""

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.storage.fingerprint import fingerprint
from lib.storage.listing import InputFile

SETTINGS = {"metric": "cosine", "columns": ["id", None], "share": 0.5, "limit": 3, "keep": True}


def test_it_is_the_hash_of_sorted_json():
    """One value is hashed as it is and several as their list, so that anybody can compute a name again."""
    text = '{"columns": ["id", null], "keep": true, "limit": 3, "metric": "cosine", "share": 0.5}'
    assert fingerprint(SETTINGS) == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert fingerprint("a", ("b", 1)) == hashlib.sha256(b'["a", ["b", 1]]').hexdigest()[:12]
    assert fingerprint(SETTINGS, digits=16) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_order_of_keys_does_not_matter_and_any_value_does():
    assert fingerprint(SETTINGS) == fingerprint(dict(reversed(SETTINGS.items())))
    others = [SETTINGS | {name: "other"} for name in SETTINGS]
    assert len({fingerprint(each) for each in [SETTINGS, *others]}) == len(SETTINGS) + 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values, json_values)
def test_two_values_share_a_fingerprint_only_if_they_are_equal(one, other):
    """Compared as text, since Python holds True and 1 for equal."""
    assert (fingerprint(one) == fingerprint(other)) == (_sorted(one) == _sorted(other))


def _sorted(value):
    if isinstance(value, dict):
        return "dict", sorted((name, repr(_sorted(each))) for name, each in value.items())
    return ("list", [_sorted(each) for each in value]) if isinstance(value, list) else repr(value)


def test_files_are_their_values():
    """A dataclass counts by its values: renaming it, or one of its fields, changes no name of a run."""
    file = InputFile("/data/a.parquet", "a.parquet", 7, "tag")
    assert fingerprint([file]) == fingerprint([["/data/a.parquet", "a.parquet", 7, "tag"]])
    assert fingerprint((file,)) == fingerprint([file])
    assert fingerprint(Path("/data")) == fingerprint("/data")


@dataclass
class Mutable:
    value: int = 1


@pytest.mark.parametrize(
    "value", [{1, 2}, b"bytes", np.float32(1), object(), {1: "a"}, Mutable(), InputFile, [{"a": {1}}]]
)
def test_a_type_that_it_does_not_know_is_refused(value):
    with pytest.raises(TypeError, match="has no fingerprint"):
        fingerprint(value)


def test_another_process_agrees():
    """No hash seed of Python's is in it."""
    code = "from lib.storage.fingerprint import fingerprint; print(fingerprint({'b': [1, 'x'], 'a': (2.5, None)}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint({"a": (2.5, None), "b": [1, "x"]})
