"""Models for mteb (extra `mteb`), whose work is done by the engine: mteb drives the same actors as our own evaluation.

    config = EvaluateConfig(model="BAAI/bge-m3", output="evaluation/")
    mteb.evaluate(MtebSearch(config), mteb.get_tasks(["T2Retrieval"]), cache=None)

MtebSearch retrieves and reranks as `jobs/evaluate_model.py` does, and mteb scores what it finds; MtebEncoder only encodes, and
mteb searches. Both keep vectors in the config's output, where the same call finds them again.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mteb.models import ModelMeta

from ..embedding import job as embed_job
from ..engine.job import require_complete
from ..engine.parts import parquet_bytes
from ..engine.stage_log import StageLog
from ..errors import UsageError
from ..index.exact.mappers import PASSAGE_ID, QUERY_ID, RUN_SCHEMA, SCORE, matrix
from ..storage.filesystem import absolute, parse_options
from ..storage.folder import Folder
from .config import EvaluateConfig, EvaluatedModels, TaskData, prompts_of, read_system, refuse_unfit
from .dataset import Dataset, Passages
from .retrieve import MOST, embed_options, rank_queries
from .tasks import Task

FILE = "texts.parquet"


class MtebSearch:
    """mteb's SearchProtocol: the config's encoder, reranker, or both in turn.

    Raises what the evaluate job raises; UsageError for a reranker alone where a task has no candidates, and for both where it
    has some.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._config, self._system = config, read_system(config)
        self.mteb_model_meta = _meta(self._system)

    def index(self, corpus: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, **_: Any) -> None:
        """Take the corpus: columns id, text, perhaps title. It is embedded when it is searched."""
        names = [name for name in ("id", "title", "text") if name in corpus.column_names]
        self._corpus = _columns(corpus, names)

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """The scores of the `top_k` best passages of every query, of its candidates where mteb gives some."""
        table = _columns(queries, ("id", "text"))
        candidates = None if top_ranked is None else _pairs(top_ranked)
        if top_k > MOST:
            raise UsageError(f"top_k={top_k}: the engine searches for {MOST:,} at most. Ask for no more")
        vectors = _kept(self._config, self._corpus)
        asked = [each for each in (self._corpus, table, candidates) if each is not None]
        passages = Passages(vectors.path(FILE), "id", self._template())
        task, dataset = _task(task_metadata), Dataset(passages, table, {}, candidates)
        refuse_unfit(task, dataset, self._system)
        work = TaskData(task, dataset, _kept(self._config, *asked), vectors, data="")
        found: dict[str, dict[str, float]] = {query: {} for query in table["id"].to_pylist()}
        for run in rank_queries(self._config, self._system, work, StageLog()):
            best = run.drop_null().sort_by([(SCORE, "descending"), (PASSAGE_ID, "descending")])
            for query, passage, score in zip(*(best[name].to_pylist() for name in RUN_SCHEMA.names), strict=True):
                if len(found[query]) < top_k:
                    found[query][passage] = score
        return found

    def _template(self) -> str:
        """The recipe's, or title and text, as mteb joins them."""
        titled = "title" in self._corpus.column_names
        asked = self._system.encoder.text_template if self._system.encoder else None
        return asked if asked and titled else "{title} {text}" if titled else "{text}"


class MtebEncoder:
    """mteb's EncoderProtocol: float32 vectors [n, dim] by the embed job; a text that cannot be embedded gets zeros."""

    def __init__(self, config: EvaluateConfig) -> None:
        self._config, self._system = config, read_system(config)
        assert self._system.encoder, "MtebEncoder encodes: give a --model or --recipe"
        self.mteb_model_meta = _meta(self._system)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **_: Any,
    ) -> np.ndarray:
        assert self._system.encoder
        texts = [text for batch in inputs for text in batch["text"]]
        rows = pa.table({"id": np.arange(len(texts)), "text": pa.array(texts, pa.large_string())})
        prompts = prompts_of(self._config, self._system.encoder, _task(task_metadata))
        prompt = prompts["queries" if getattr(prompt_type, "value", prompt_type) == "query" else "passages"]
        folder = _kept(self._config, rows)
        texts_there = Passages(folder.path(FILE), "id", "{text}")
        options = embed_options(self._config, prompt, texts_there, folder, "vectors")
        outcome = require_complete(embed_job.embed(options), options.output)
        vectors = np.zeros((len(texts), self._system.encoder.spec.dim), np.float32)
        for part in outcome.parts:
            with Folder(options.output, folder.options).open(part.part) as file:
                table = pq.read_table(file, columns=["id", "embedding"]).drop_null()
            vectors[table["id"].to_numpy()] = matrix(table["embedding"])
        return vectors

    def similarity(self, left: Any, right: Any) -> np.ndarray:
        """[n, m]"""
        return self._comparable(left) @ self._comparable(right).T

    def similarity_pairwise(self, left: Any, right: Any) -> np.ndarray:
        """[n]"""
        return (self._comparable(left) * self._comparable(right)).sum(axis=-1)

    def _comparable(self, vectors: Any) -> np.ndarray:
        array = np.asarray(vectors, np.float32)
        return (
            array / np.maximum(np.linalg.norm(array, axis=-1, keepdims=True), 1e-12) if self._system.cosine else array
        )


def _meta(system: EvaluatedModels) -> ModelMeta:
    name = system.name.replace("__", "/")
    name = name if name.count("/") == 1 else f"shoal/{system.name}"
    return ModelMeta.create_empty(overwrites={"name": name, "revision": system.revision})


def _task(metadata: Any) -> Task:
    return Task(name=metadata.name)


def _columns(rows: Any, names: Sequence[str]) -> pa.Table:
    """Columns of a `datasets.Dataset` as text."""
    return pa.table({name: pa.array(list(rows[name]), pa.large_string()) for name in names})


def _pairs(top_ranked: Mapping[str, Sequence[str]]) -> pa.Table:
    pairs = [(query, passage) for query, listed in top_ranked.items() for passage in listed]
    columns = zip(*pairs, strict=True) if pairs else ((), ())
    return pa.table({n: pa.array(c, pa.large_string()) for n, c in zip((QUERY_ID, PASSAGE_ID), columns, strict=True)})


def _kept(config: EvaluateConfig, rows: pa.Table, *others: pa.Table) -> Folder:
    """The rows in FILE of a folder named after all the tables, so that the same ones find what was made of them."""
    data = parquet_bytes(rows)
    digest = hashlib.sha256(b"".join([data, *map(parquet_bytes, others)])).hexdigest()[:12]
    folder = Folder(f"{absolute(config.output).rstrip('/')}/stages/mteb-{digest}", parse_options(config.storage_option))
    folder.claim(FILE, data)
    return folder
