"""BGE-M3's sparse and multi-vector outputs, against a plain loop on a tiny checkpoint of its architecture."""

import json

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lib.cli.options import configure
from lib.embedding.config import EmbedConfig
from lib.embedding.job import embed
from lib.errors import ModelError, UsageError
from tests.support import tiny

TEXTS = [*tiny.TEXT, "fish fish water fish", "", None, "水 和 鱼"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny XLM-RoBERTa with the two layers that FlagEmbedding saves beside it."""
    folder = tiny.build("xlm-roberta", tmp_path_factory.mktemp("m3"), pooling="cls")
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    torch.manual_seed(3)
    for name, out in (("sparse_linear.pt", 1), ("colbert_linear.pt", width)):
        torch.save(torch.nn.Linear(width, out).state_dict(), folder / name)
    return folder


@torch.inference_mode()
def reference_outputs(folder, text):
    """Compute the lexical weights by token id and the vectors of one text alone, as FlagEmbedding's BGEM3FlagModel does."""
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    layers = [torch.load(folder / name) for name in ("sparse_linear.pt", "colbert_linear.pt")]
    ids = tokenizer(text, truncation=True, return_tensors="pt")
    states = network(**ids).last_hidden_state[0]
    weights = torch.relu(states @ layers[0]["weight"].T + layers[0]["bias"])[:, 0].tolist()
    unused = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>", "<unk>"])
    greatest: dict[int, float] = {}
    for token, weight in zip(ids["input_ids"][0].tolist(), weights, strict=True):
        if token not in unused and weight > greatest.get(token, 0.0):
            greatest[token] = weight
    vectors = states[1:] @ layers[1]["weight"].T + layers[1]["bias"]
    return greatest, torch.nn.functional.normalize(vectors, dim=1).numpy()


def run(folder, model, **changes):
    (folder / "in").mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"id": range(len(TEXTS)), "text": pa.array(TEXTS, pa.string())}), folder / "in" / "a.parquet"
    )
    settings = {"input": str(folder / "in"), "output": str(folder / "out"), "model": str(model), "dtype": "float32"}
    settings |= {"outputs": ("dense", "sparse", "multi_vector"), "executor": "local"}
    embed(configure(EmbedConfig, **(settings | changes)))
    return sorted((folder / "out").glob("part-*"))


def test_all_three_outputs_equal_a_plain_loop(tmp_path, model):
    """Weights are equal within 1e-4 and vectors within the rounding of float16; rows without a text are null.

    The columns have the documented types, and Polars and DuckDB read them.
    """
    (part,) = run(tmp_path, model)
    table = pq.read_table(part)

    assert table.schema.field("sparse").type.names == ["indices", "values"]
    for text, row in zip(TEXTS, table.to_pylist(), strict=True):
        if not text:
            assert (row["sparse"], row["multi_vector"], row["embedding"]) == (None, None, None)
            continue
        weights, vectors = reference_outputs(model, text)
        assert row["sparse"]["indices"] == sorted(weights)
        np.testing.assert_allclose(row["sparse"]["values"], [weights[i] for i in sorted(weights)], atol=1e-4)
        np.testing.assert_allclose(np.array(row["multi_vector"], np.float32), vectors, atol=1e-3)
    assert any(row["sparse"]["indices"] for row in table.to_pylist() if row["sparse"])
    assert_polars_and_duckdb_read(part, table.to_pylist())


def assert_polars_and_duckdb_read(part, expected):
    """Assert that Polars and DuckDB read the lists and structs of a part."""
    frame = polars.read_parquet(part)
    assert frame["sparse"].to_list()[0]["indices"] == expected[0]["sparse"]["indices"]
    assert len(frame["multi_vector"][0]) == len(expected[0]["multi_vector"])
    indices, count = duckdb.sql(f"select sparse.indices, len(multi_vector) from '{part}' order by id").fetchall()[0]
    assert (indices, count) == (expected[0]["sparse"]["indices"], len(expected[0]["multi_vector"]))


def test_wrong_models_and_outputs_are_refused(tmp_path, minilm, model):
    """The driver refuses a model without the two layers, and an output that does not exist."""
    with pytest.raises(ModelError, match=r"no sparse_linear\.pt"):
        run(tmp_path, minilm)
    with pytest.raises(UsageError, match="choose from dense, sparse, multi_vector"):
        run(tmp_path, model, outputs=("dense", "colbert"))
