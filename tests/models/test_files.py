"""Files of a model: faults are refused before anything is loaded, and the revision follows the weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lib.errors import ModelError
from lib.models import files
from lib.models.spec_reader import read_spec
from tests.support.reference import change_json, remove


def test_the_revision_follows_the_weights(build: Any, tmp_path: Path) -> None:
    """A copy has the same fingerprint and other weights have another; a hub snapshot has its commit."""
    folder = tmp_path / "copy"
    shutil.copytree(build("bert"), folder)
    original = read_spec(str(build("bert"))).revision
    assert original == read_spec(str(folder)).revision
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"\x01\x02\x03\x04")
    snapshot = tmp_path / "models--a--b/snapshots" / ("0123456789" * 4)
    shutil.copytree(folder, snapshot)

    assert original.startswith("weights-")
    assert original != read_spec(str(folder)).revision
    assert read_spec(str(snapshot)).revision == "0123456789" * 4


def set_module_type(folder: Path, dotted: str) -> None:
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["type"] = dotted
    (folder / "modules.json").write_text(json.dumps(listed))


FAULTS: dict[str, Callable[[Path], Any]] = {
    "no config": lambda folder: remove(folder, "config.json"),
    "broken config": lambda folder: (folder / "config.json").write_text("{"),
    "no tokenizer": lambda folder: remove(folder, *files.VOCABULARIES),
    "no weights": lambda folder: remove(folder, "model.safetensors"),
    "adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "own code": lambda folder: change_json(folder, "config.json", auto_map={"AutoModel": "modeling_qwen.Qwen2Model"}),
    "chat": lambda folder: change_json(folder, "sentence_bert_config.json", modality_config={"message": {}}),
    "options": lambda folder: change_json(folder, "sentence_bert_config.json", config_args={"rope_theta": 1.0}),
    "CNN": lambda folder: set_module_type(folder, "sentence_transformers.models.CNN"),
    "strange": lambda folder: set_module_type(folder, "my_code.Pooling"),
}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no config", "has no config.json"),
        ("broken config", "cannot be read as JSON"),
        ("no tokenizer", "has no tokenizer"),
        ("no weights", "has no weights"),
        ("adapter", "Merge it"),
        ("own code", "bidirectional=True"),
        ("chat", "chat template"),
        ("options", "rope_theta"),
        ("CNN", "CNN.*It runs Transformer, Pooling"),
        ("strange", "my_code.Pooling"),
    ],
)
def test_spoilt_directories_are_refused_by_the_driver(fault: str, message: str, build: Any, tmp_path: Path) -> None:
    """Each fault raises its own message while the spec is read."""
    folder = tmp_path / "spoilt"
    shutil.copytree(build("bert"), folder)
    read_spec(str(folder))
    FAULTS[fault](folder)
    with pytest.raises(ModelError, match=message):
        read_spec(str(folder))


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "shoal-tests/no-such-model"])
def test_a_model_that_is_nowhere_is_refused(model: str) -> None:
    """A model that is neither a directory nor on the hub is refused with a message that names it."""
    with pytest.raises(ModelError, match=r"nowhere|no-such-model"):
        read_spec(model)
