"""Loading a network: weights that are missing or damaged are refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from lib.errors import ModelError
from lib.models.encoder import Encoder
from lib.models.spec_reader import read_spec


def test_missing_weights_inside_a_file_are_refused(build: Any, tmp_path: Path) -> None:
    """A file without one of the weights is refused; transformers would fill them with random numbers."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "holes"
    shutil.copytree(build("bert"), folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights"):
        Encoder(read_spec(str(folder)))


def test_damaged_weights_are_refused(build: Any, tmp_path: Path) -> None:
    """A truncated file raises ModelError."""
    folder = tmp_path / "short"
    shutil.copytree(build("bert"), folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        Encoder(read_spec(str(folder)))
