"""The layouts of a model directory: current and old ones of sentence-transformers, and a plain checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

from lib.models.spec_reader import read_spec
from tests.support.reference import (
    TEXTS,
    assert_close,
    reference,
    vectors,
)


def test_a_directory_saved_by_sentence_transformers_reads_the_same(build: Any, tmp_path: Path) -> None:
    """The layout that sentence-transformers 6.2 writes gives the same vectors, and its length from the tokenizer."""
    folder = build("xlm-roberta", pooling="cls", dense=8)
    reference(folder).save(str(tmp_path / "saved"))

    assert read_spec(str(tmp_path / "saved")).max_tokens == 64
    assert_close(vectors(tmp_path / "saved", TEXTS), reference(folder).encode(TEXTS))


def test_old_pooling_booleans_and_a_transformer_subfolder(build: Any, tmp_path: Path) -> None:
    """Directories of the first releases, with a boolean for each pooling mode and a subfolder, give the same vectors."""
    folder = tmp_path / "old"
    shutil.copytree(build("bert"), folder)
    (folder / "0_Transformer").mkdir()
    for file in [
        file for file in folder.iterdir() if file.is_file() and file.name not in ("modules.json", "README.md")
    ]:
        if file.name != "config_sentence_transformers.json":
            file.rename(folder / "0_Transformer" / file.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    old = {"word_embedding_dimension": 32, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(old))

    assert read_spec(str(folder)).pooling == ("cls", "max")
    assert_close(vectors(folder, TEXTS), reference(folder).encode(TEXTS))


def test_a_plain_checkpoint_is_pooled_as_sentence_transformers_does(build: Any, tmp_path: Path) -> None:
    """A checkpoint without modules.json has mean pooling, no normalisation, and the tokenizer's length."""
    folder = tmp_path / "plain"
    shutil.copytree(build("bert"), folder)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / name).unlink()

    assert read_spec(str(folder)).max_tokens == 128
    assert_close(vectors(folder, TEXTS), reference(folder).encode(TEXTS))
