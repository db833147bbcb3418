"""What a model's files say, and what is refused before anything is loaded."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.errors import ModelError, UsageError
from lib.models import files
from lib.models.encoder import Encoder
from lib.models.spec import Tokens, flops_per_token
from lib.models.spec_reader import SpecOverrides, read_spec
from tests.support.reference import LONG, change_json, minilm, remove, vectors


def test_reading_a_spec_loads_neither_torch_nor_transformers(build: Any) -> None:
    """The driver reads a spec in milliseconds on a machine without torch; the spec pickles and is plain JSON."""
    code = "import sys; from lib.models.spec_reader import read_spec; read_spec(sys.argv[1])"
    code += "; print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, str(build("bert"))], capture_output=True, text=True, check=True)
    spec = read_spec(str(build("bert")))

    assert done.stdout.strip() == "set()"
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert json.loads(json.dumps(dataclasses.asdict(spec)))["pooling"] == ["mean"]


def test_flops_of_minilm() -> None:
    """21.2 million a token for the matrices and 9,216 for each token attended to."""
    spec = read_spec(str(minilm()))

    assert flops_per_token(spec, 0) == pytest.approx(21.2e6, rel=0.01)
    assert flops_per_token(spec, 100) - flops_per_token(spec, 0) == 921_600


def test_the_revision_follows_the_weights(build: Any, tmp_path: Path) -> None:
    """A fingerprint is the same for a copy, and another for other weights; a hub snapshot keeps its commit."""
    folder = tmp_path / "copy"
    shutil.copytree(build("bert"), folder)
    first = read_spec(str(build("bert"))).revision
    assert first == read_spec(str(folder)).revision
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"\x01\x02\x03\x04")
    snapshot = tmp_path / "models--a--b/snapshots" / ("0123456789" * 4)
    shutil.copytree(folder, snapshot)

    assert first.startswith("weights-")
    assert first != read_spec(str(folder)).revision
    assert read_spec(str(snapshot)).revision == "0123456789" * 4


def rename_module(folder: Path, dotted: str) -> None:
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["type"] = dotted
    (folder / "modules.json").write_text(json.dumps(listed))


SPOILS: dict[str, Callable[[Path], Any]] = {
    "no config": lambda folder: remove(folder, "config.json"),
    "broken config": lambda folder: (folder / "config.json").write_text("{"),
    "no tokenizer": lambda folder: remove(folder, *files.VOCABULARIES),
    "no weights": lambda folder: remove(folder, "model.safetensors"),
    "adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "own code": lambda folder: change_json(folder, "config.json", auto_map={"AutoModel": "modeling_qwen.Qwen2Model"}),
    "chat": lambda folder: change_json(folder, "sentence_bert_config.json", modality_config={"message": {}}),
    "options": lambda folder: change_json(folder, "sentence_bert_config.json", config_args={"rope_theta": 1.0}),
    "CNN": lambda folder: rename_module(folder, "sentence_transformers.models.CNN"),
    "strange": lambda folder: rename_module(folder, "my_code.Pooling"),
}


@pytest.mark.parametrize(
    ("how", "message"),
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
def test_spoilt_directories_are_refused_by_the_driver(how: str, message: str, build: Any, tmp_path: Path) -> None:
    """Each fault has its own message, raised while reading the spec."""
    folder = tmp_path / "spoilt"
    shutil.copytree(build("bert"), folder)
    read_spec(str(folder))
    SPOILS[how](folder)
    with pytest.raises(ModelError, match=message):
        read_spec(str(folder))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_tokens": 129}, "1 to 128"),
        ({"max_tokens": 0}, "1 to 128"),
        ({"truncate_dim": 8}, "is_matryoshka"),
        ({"truncate_dim": 33}, "1 to 32"),
        ({"pooling": "average"}, "Choose from cls"),
    ],
)
def test_what_the_model_cannot_do_is_refused(asked: dict[str, Any], message: str, build: Any) -> None:
    """The message has the choices."""
    with pytest.raises(ModelError, match=message):
        read_spec(str(build("bert")), SpecOverrides(**asked))


def test_roberta_positions_beyond_padding_are_counted(build: Any) -> None:
    """A table of 130 positions serves 128 tokens of a RoBERTa, and not one more."""
    assert read_spec(str(build("roberta")), SpecOverrides(max_tokens=128)).max_tokens == 128
    with pytest.raises(ModelError, match="1 to 128"):
        read_spec(str(build("roberta")), SpecOverrides(max_tokens=129))
    longest = vectors(build("roberta"), [LONG * 3], max_tokens=128)
    assert np.isfinite(longest).all()


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "shoal-tests/no-such-model"])
def test_a_model_that_is_nowhere_is_refused(model: str) -> None:
    """Neither a directory nor a hub id that can be fetched: the message names what was tried."""
    with pytest.raises(ModelError, match=r"nowhere|no-such-model"):
        read_spec(model)


def test_missing_weights_inside_a_file_are_refused(build: Any, tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "holes"
    shutil.copytree(build("bert"), folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights"):
        Encoder(read_spec(str(folder)))


def test_damaged_weights_are_refused(build: Any, tmp_path: Path) -> None:
    """A file cut short is an error with the directory's name."""
    folder = tmp_path / "short"
    shutil.copytree(build("bert"), folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        Encoder(read_spec(str(folder)))


def test_tokens_of_another_model_are_refused(build: Any) -> None:
    """Ids beyond the vocabulary and texts beyond the length are said before they reach a kernel."""
    spec = read_spec(str(build("bert")))
    runner = Encoder(spec, dtype="float32")
    with pytest.raises(UsageError, match="use this model's Tokenizer"):
        runner.encode(Tokens(np.array([99_999], np.int32), np.array([0, 1]), np.zeros(1, bool)))
    with pytest.raises(UsageError, match="the model takes 64"):
        runner.encode(Tokens(np.ones(65, np.int32), np.array([0, 65]), np.zeros(1, bool)))


@pytest.mark.parametrize("options", [{"dtype": "int3"}, {"token_budget": 0}])
def test_wrong_arguments_are_refused(options: dict[str, Any], build: Any) -> None:
    """An unknown precision and a budget of nothing."""
    with pytest.raises(UsageError):
        Encoder(read_spec(str(build("bert"))), **options)
