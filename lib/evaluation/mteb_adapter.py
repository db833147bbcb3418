"""Models for mteb (extra `mteb`) that run on the engine: mteb drives the same jobs as the evaluate job.

    config = configure(EvaluateConfig, model="BAAI/bge-m3", output="evaluation/")
    mteb.evaluate(MtebSearch(config), mteb.get_tasks(["T2Retrieval"]), cache=None)

MtebSearch retrieves and reranks as `jobs/evaluate_model.py` does, and mteb scores the rankings. MtebEncoder only encodes, and mteb
searches. Both keep vectors in the config's output, and the same call reuses them.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mteb.models import ModelMeta

from ..cli.options import show_messages
from ..data.vectors import as_matrix
from ..embedding import job as embed_job
from ..engine.job import require_complete, stage_folder
from ..engine.parts import parquet_bytes
from ..engine.stage_log import StageLog
from ..errors import UsageError
from ..index.exact.mappers import PASSAGE_ID, QUERY_ID, RANKING_SCHEMA, SCORE
from ..storage.folder import Folder
from .config import EvaluateConfig, check
from .dataset import Dataset, Passages, text_table
from .models import prompts_of, resolve_models
from .retrieve import MAX_CUT, embed_config, rank_queries
from .task_data import TaskData, check_fit
from .tasks import Task

FILE = "texts.parquet"


class _Adapter:
    """The models of a config, and their description for mteb."""

    def __init__(self, config: EvaluateConfig) -> None:
        check(config)
        show_messages()  # mteb says nothing of what the engine does
        self._config, self._models = config, resolve_models(config)
        name = self._models.name.replace("__", "/")
        name = name if name.count("/") == 1 else f"shoal/{self._models.name}"
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": name, "revision": self._models.revision})


class MtebSearch(_Adapter):
    """mteb's SearchProtocol: the config's encoder, reranker, or both in turn.

    Raises the errors of the evaluate job; UsageError for a reranker alone where a task has no candidates, and for both where it has
    some.
    """

    def index(self, corpus: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, **_: Any) -> None:
        """Take the corpus: columns id, text, perhaps title. It is embedded with the first search."""
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
        if top_k > MAX_CUT:
            raise UsageError(f"top_k={top_k}: the engine searches for {MAX_CUT:,} at most. Ask for no more")
        vectors = _store(self._config, self._corpus)
        tables = [each for each in (self._corpus, table, candidates) if each is not None]
        passages = Passages(vectors.path(FILE), "id", self._template())
        task, dataset = Task(name=task_metadata.name), Dataset(passages, table, {}, candidates)
        check_fit(task, dataset, self._models)
        data = TaskData(task, dataset, _store(self._config, *tables), vectors, digest="")
        results: dict[str, dict[str, float]] = {query: {} for query in table["id"].to_pylist()}
        for ranking in rank_queries(self._config, self._models, data, StageLog()):
            best = ranking.drop_null().sort_by([(SCORE, "descending"), (PASSAGE_ID, "descending")])
            for query, passage, score in zip(*(best[name].to_pylist() for name in RANKING_SCHEMA.names), strict=True):
                if len(results[query]) < top_k:
                    results[query][passage] = score
        return results

    def _template(self) -> str:
        """The recipe's template, or title and text, as mteb joins them."""
        if "title" not in self._corpus.column_names:
            return "{text}"
        encoder = self._models.encoder
        return (encoder.text_template if encoder else None) or "{title} {text}"


class MtebEncoder(_Adapter):
    """mteb's EncoderProtocol: float32 vectors [n, dim] by the embed job; a text that cannot be embedded gets zeros."""

    def __init__(self, config: EvaluateConfig) -> None:
        super().__init__(config)
        assert self._models.encoder, "MtebEncoder encodes: give a --model or --recipe"

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
        assert self._models.encoder
        texts = [text for batch in inputs for text in batch["text"]]
        rows = pa.table({"id": np.arange(len(texts)), "text": pa.array(texts, pa.large_string())})
        prompts = prompts_of(self._config, self._models.encoder, Task(name=task_metadata.name))
        prompt = prompts["queries" if getattr(prompt_type, "value", prompt_type) == "query" else "passages"]
        folder = _store(self._config, rows)
        stored = Passages(folder.path(FILE), "id", "{text}")
        embedding = embed_config(self._config, prompt, stored, folder, "vectors")
        output = embedding.run.folder
        outcome = require_complete(embed_job.embed(embedding), output.url)
        vectors = np.zeros((len(texts), self._models.encoder.spec.dim), np.float32)
        for part in outcome.parts:
            with output.open(part.part) as file:
                table = pq.read_table(file, columns=["id", "embedding"]).drop_null()
            vectors[table["id"].to_numpy()] = as_matrix(table["embedding"], np.float32)
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
            array / np.maximum(np.linalg.norm(array, axis=-1, keepdims=True), 1e-12) if self._models.cosine else array
        )


def _columns(rows: Any, names: Sequence[str]) -> pa.Table:
    """Columns of a `datasets.Dataset` as text."""
    return text_table({name: list(rows[name]) for name in names})


def _pairs(top_ranked: Mapping[str, Sequence[str]]) -> pa.Table:
    pairs = [(query, passage) for query, listed in top_ranked.items() for passage in listed]
    return text_table({QUERY_ID: [query for query, _ in pairs], PASSAGE_ID: [passage for _, passage in pairs]})


def _store(config: EvaluateConfig, rows: pa.Table, *others: pa.Table) -> Folder:
    """Write the rows as FILE into a folder named after all the tables, so that the same tables have the same stages."""
    digests = [hashlib.sha256(parquet_bytes(table)).hexdigest() for table in (rows, *others)]
    folder = stage_folder(config.folder, "mteb", digests)
    folder.claim(FILE, parquet_bytes(rows))
    return folder
