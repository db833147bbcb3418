"""docs/quickstart.md, word for word, on a tiny model in the place of MiniLM."""

import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from tests.support.tiny import build, build_reranker

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quickstart.md"
BLOCKS = re.compile(r"^```sh quickstart\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_here(words: Sequence[str]) -> None:
    """`python FILE WORDS`, in this process: seconds sooner than in a process of its own."""
    file, *rest = words
    if file.startswith("jobs/"):
        code = runpy.run_path(str(ROOT / file))["main"].main(list(rest), prog_name=file, standalone_mode=False)
        assert code in (0, None), f"{file} ended with exit code {code}"
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [file, *rest])
        runpy.run_path(str(ROOT / file), run_name="__main__")


@pytest.fixture
def models(minilm, tmp_path, monkeypatch) -> None:
    """Tiny models in folders that have the names of the hub's: a name that is a folder here is that folder."""
    encoder = build("bert", tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2", max_seq_length=128, positions=128)
    reranker = build_reranker("bert", tmp_path / "cross-encoder" / "ms-marco-MiniLM-L6-v2")
    use_words(minilm, encoder, AutoModel)
    use_words(minilm, reranker, AutoModelForSequenceClassification)
    monkeypatch.chdir(tmp_path)


def use_words(minilm: str, folder: Path, kind: type) -> None:
    """Give a tiny model MiniLM's vocabulary: its own one has letters in the place of most words, three times the tokens."""
    network, tokenizer = kind.from_pretrained(folder), AutoTokenizer.from_pretrained(minilm)
    network.resize_token_embeddings(len(tokenizer))
    network.save_pretrained(folder)
    tokenizer.model_max_length = network.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def rows(folder: Path) -> list[dict]:
    return ds.dataset(sorted(map(str, folder.glob("part-*.parquet")))).to_table().to_pylist()


def test_every_command_of_the_page_works(models, tmp_path):
    """Each command ends well; 1,000 documents have vectors of both models, 100 queries have 3 scores; the comparison names both."""
    lines = [line for block in BLOCKS.findall(PAGE.read_text()) for line in block.splitlines()]
    for line in lines:
        python, *words = shlex.split(line)
        assert python == "python", f"the test runs Python alone: {line}"
        run_here(words)

    made = tmp_path / "quickstart"
    assert len(rows(made / "vectors")) == len(rows(made / "vectors-2")) == 1_000
    assert len(rows(made / "scores")) == 3 * 100
    assert {row["error"] for row in rows(made / "scores")} == {None}
    assert (made / "index" / "README.md").exists()
    assert {"before", "after"} <= set(re.findall(r"\w+", (made / "evaluation" / "comparison.md").read_text()))


def test_every_job_of_the_loop_is_on_the_page():
    """The page uses every job but those of clusters and conversions."""
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"submit_job", "convert_reranker"}

    assert jobs == set(re.findall(r"python jobs/(\w+)\.py", PAGE.read_text()))
