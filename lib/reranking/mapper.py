"""What reranking does with one shard: pairs read, tokenised, scored, a table to publish."""

import json
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.reader import read_rows
from ..data.shards import Shard
from ..data.texts import as_text, compose
from ..engine.job import SharedRunOptions
from ..engine.join import read_sources
from ..engine.mapper import NOT_FINITE, Tables
from ..engine.shuffle import KEY, REASON, attach
from ..errors import InputError
from ..models.packing import offsets_of, padding_waste
from ..models.pair_tokenizer import PairFormat, Pairs
from ..models.reranker_options import RerankerOptions
from ..models.reranker_spec import RerankSpec
from ..models.spec import Tokens, on_this_machine

PAIRS_AT_ONCE = 4096
PAIR = ("query", "passage")  # columns of texts that a source gives, and REASON


@dataclass(frozen=True, kw_only=True)
class RerankConfig(SharedRunOptions, RerankerOptions):
    """Everything `jobs/rerank_pairs.py` can be told."""

    text_column: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Column with the passage. Default: passage; with --corpus, text."}
    )
    query_column: str | None = field(
        default=None, metadata={"help": "Column with the query. Default: query; with --queries, text."}
    )
    corpus: str | None = field(
        default=None, metadata={"help": "Passages by id: the input then holds candidates, ids of query and passage."}
    )
    queries: str | None = field(default=None, metadata={"help": "Queries by id, with --corpus."})
    query_id_column: str = field(default="query_id", metadata={"help": "Column with the query's id."})
    passage_id_column: str = field(default="passage_id", metadata={"help": "Column with the passage's id."})
    corpus_id_column: str | None = field(
        default=None,
        metadata={"help": "Column with the id in --corpus. Default: as in the candidates, else _id or id."},
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Rank each query's passages and keep the best N.", "min": 1}
    )

    def text_columns(self) -> list[str]:
        passage = super().text_columns() if self.text_template else [self.text_column or "passage"]
        return list(dict.fromkeys([self.query_column or "query", *passage]))


class PairSource(Protocol):
    """Where the texts of a shard's pairs come from."""

    def read(self, shard: Shard) -> tuple[pa.Table, int]:
        """Columns `query` and `passage` (large_string, null where there is none), KEY (equal for pairs of one query),
        REASON, and those of the output. And how many of the plan's rows were read."""
        ...


@dataclass(frozen=True)
class PairRows:
    """Both texts stand in the rows."""

    query_column: str
    template: tuple[tuple[str, str | None], ...]
    id_column: str | None
    carried: tuple[str, ...]
    columns: pa.Schema
    storage: Mapping[str, Any]

    def read(self, shard: Shard) -> tuple[pa.Table, int]:
        names = [self.query_column, *(name for _, name in self.template), self.id_column, *self.carried]
        table = read_rows(shard, [name for name in dict.fromkeys(names) if name], self.columns, self.storage)
        query, no_query = compose(table, [("", self.query_column)])
        passage, no_passage = compose(table, self.template)
        data = {"id": self._ids(table)} | {name: table[name] for name in self.carried}
        reasons = pc.coalesce(table["_error"], _of("query", no_query), _of("passage", no_passage))
        texts = {"query": query, "passage": passage, KEY: query, REASON: reasons}
        return pa.table(data | texts), table.num_rows

    def _ids(self, table: pa.Table) -> pa.Array | pa.ChunkedArray:
        if self.id_column is None:
            return table["_source"]
        column = table[self.id_column]
        return as_text(column)[0] if pa.types.is_large_string(column.type) else column


@dataclass(frozen=True)
class CandidateRows:
    """A bucket of candidates that have their passages, and of queries: the pairs of a query are side by side."""

    candidates: str
    queries: str
    columns: pa.Schema
    storage: Mapping[str, Any]

    def read(self, shard: Shard) -> tuple[pa.Table, int]:
        left, right = read_sources(shard, self.candidates, self.queries, self.columns, self.storage)
        pairs = attach(left, right, "query")
        order = pc.sort_indices(pairs, [(KEY, "ascending")])  # stable
        return pairs.take(order), shard.rows


@dataclass(frozen=True)
class RerankMapper:
    """The verb that `sharded` runs: what happens to one shard. Travels to every task and actor."""

    config: RerankConfig
    spec: RerankSpec
    source: PairSource
    threads: int
    device: str

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        """Rows, each with the numbers of its pair and query, and the pairs as token ids."""
        began = time.perf_counter()
        table, source_rows = self.source.read(shard)
        reasons = table[REASON].combine_chunks()
        self._stop_if_strict(table, reasons)
        was_read = time.perf_counter()
        whole = pc.is_null(reasons)
        queries, passages = (table[name].combine_chunks() for name in PAIR)
        tokens, second = _tokenised(_pair_format(self.spec), queries.filter(whole), passages.filter(whole))
        number = pa.array(np.cumsum(whole.to_numpy(zero_copy_only=False)) - 1)
        group = table[KEY].combine_chunks().dictionary_encode().indices
        rows = table.drop_columns([*PAIR, KEY, REASON]).append_column("error", reasons)
        rows = rows.append_column("_pair", pc.if_else(whole, number, pa.scalar(None, pa.int64())))
        pairs = {
            "ids": pa.LargeListArray.from_arrays(tokens.offsets, tokens.ids),
            "truncated": tokens.truncated,
            "second": second,
            "query": group.filter(whole),
        }
        seconds = {"read": was_read - began, "tokenise": time.perf_counter() - was_read}
        rows = rows.replace_schema_metadata({"source_rows": str(source_rows)})
        return {"rows": rows, "pairs": pa.table(pairs)}, seconds

    def worker(self) -> Callable[[Tables], Tables]:
        """Load the model; what is returned turns pairs into scores."""
        from ..models.reranker import Reranker

        reranker = Reranker(
            _here(self.spec),
            dtype=self.config.dtype,
            device=self.device,
            token_budget=self.config.token_budget,
            threads=self.threads,
        )
        made = {"dtype": reranker.dtype, "mode": reranker.mode}

        def work(bundle: Tables) -> Tables:
            pairs = _to_pairs(bundle["pairs"])
            before = reranker.computed
            facts = {
                "score": reranker.score(pairs, bundle["pairs"]["query"].to_numpy().astype(np.int64)),
                "tokens": np.diff(pairs.tokens.offsets).astype(np.int32),
                "truncated": pairs.tokens.truncated,
                "query": bundle["pairs"]["query"],
            }
            counted = made | {"computed": str(reranker.computed - before)}
            return {"rows": bundle["rows"], "scores": pa.table(facts).replace_schema_metadata(counted)}

        return work

    def lengths(self, bundle: Tables) -> tuple[int, np.ndarray, np.ndarray]:
        """For an estimate: rows read, and of each pair its tokens and whether it is cut."""
        tokens = _to_pairs(bundle["pairs"]).tokens
        return int(bundle["rows"].schema.metadata[b"source_rows"]), np.diff(tokens.offsets), tokens.truncated

    def finish(self, shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
        """The rows as published, and their counts."""
        rows, facts = bundle["rows"], bundle["scores"]
        pair = rows["_pair"].combine_chunks()
        score = facts["score"].combine_chunks().take(pair)
        broken = pc.invert(pc.is_finite(score)).fill_null(False)
        error = pc.if_else(broken, f"the model gave a score {NOT_FINITE}", rows["error"]).cast(pa.string())
        data = {name: rows[name] for name in rows.column_names if name not in ("_pair", "error")}
        data["score"] = pc.if_else(broken, pa.scalar(None, pa.float32()), score)
        if self.config.top_k:
            data["rank"] = ranks(data["score"], facts["query"].combine_chunks().take(pair))
        data["tokens"] = facts["tokens"].combine_chunks().take(pair).fill_null(0)
        data["truncated"] = facts["truncated"].combine_chunks().take(pair).fill_null(False)
        made = {key.decode(): value.decode() for key, value in facts.schema.metadata.items()}
        computed = int(made.pop("computed"))
        table = pa.table(data | {"error": error}).replace_schema_metadata({"shoal": json.dumps(self.about() | made)})
        lengths = facts["tokens"].to_numpy()
        tokens, waste = int(lengths.sum()), padding_waste(lengths)
        if self.config.top_k:
            table = table.filter(pc.less_equal(pc.fill_null(table["rank"], 0), self.config.top_k))
        counts = {
            "rows": table.num_rows,
            "source_rows": int(rows.schema.metadata[b"source_rows"]),
            "errors": table.num_rows - table["error"].null_count,
            "truncated": pc.sum(table["truncated"]).as_py() or 0,
            "tokens": tokens,
            "encoded": computed,
            "padded": round(tokens / (1 - waste)) if waste < 1 else tokens,
        }
        return table, counts

    def about(self) -> dict[str, Any]:
        """What a reader of the scores must know."""
        return {
            "model": self.spec.model.name,
            "revision": self.spec.model.revision,
            "segments": list(self.spec.segments),
            "answers": list(self.spec.answers),
            "activation": self.spec.activation,
            "max_tokens": self.spec.model.max_tokens,
        }

    def _stop_if_strict(self, table: pa.Table, reasons: pa.Array) -> None:
        if self.config.strict and reasons.null_count < len(reasons):
            row = pc.index(pc.is_valid(reasons), True).as_py()
            ids = table.drop_columns([*PAIR, KEY, REASON])
            name = ", ".join(f"{column} {ids[column][row]}" for column in ids.column_names)
            raise InputError(f"{name}: {reasons[row]} (--strict is on; without it the row is kept with a reason)")


def _tokenised(pair_format: PairFormat, queries: pa.Array, passages: pa.Array) -> Pairs:
    """All pairs, some thousand at a time: as Python numbers their ids take ten times the memory."""
    starts = range(0, max(len(queries), 1), PAIRS_AT_ONCE)
    slices = [(side.slice(start, PAIRS_AT_ONCE).to_pylist() for side in (queries, passages)) for start in starts]
    found = [pair_format(*both) for both in slices]
    tokens = [each.tokens for each in found]
    offsets = offsets_of(np.concatenate([np.diff(each.offsets) for each in tokens]))
    ids, truncated = (np.concatenate([getattr(each, name) for each in tokens]) for name in ("ids", "truncated"))
    return Pairs(Tokens(ids, offsets, truncated), np.concatenate([each.second for each in found]))


def ranks(scores: pa.Array, queries: pa.Array) -> pa.Array:
    """int32 [n]: 1 for the highest score of each query; equal scores in row order; null where the score is."""
    score = np.nan_to_num(scores.to_numpy(zero_copy_only=False), nan=-np.inf)
    query = pc.fill_null(queries, -1).to_numpy()
    order = np.lexsort((-score, query))
    ordered = query[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))[: len(ordered)]
    places = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.append(starts, len(ordered))))
    found = np.empty(len(ordered), np.int32)
    found[order] = places + 1
    return pc.if_else(pc.is_valid(scores), pa.array(found), pa.scalar(None, pa.int32()))


def _of(side: str, reasons: pa.Array) -> pa.Array:
    """Why a pair has no score: 'query: null text'."""
    return pc.binary_join_element_wise(pa.scalar(f"{side}: "), reasons, pa.scalar(""))


def _to_pairs(table: pa.Table) -> Pairs:
    """The `pairs` table of a bundle as views of its buffers."""
    ids = table["ids"].combine_chunks()
    offsets = ids.offsets.to_numpy()
    flat = ids.values.to_numpy()[offsets[0] : offsets[-1]]
    truncated = table["truncated"].combine_chunks().to_numpy(zero_copy_only=False)
    return Pairs(Tokens(flat, offsets - offsets[0], truncated), table["second"].to_numpy())


def _here(spec: RerankSpec) -> RerankSpec:
    return replace(spec, model=on_this_machine(spec.model))


def _pair_format(spec: RerankSpec) -> PairFormat:
    """Loaded once a process."""
    return _pair_format_of(pickle.dumps(spec))


@lru_cache(maxsize=2)
def _pair_format_of(spec: bytes) -> PairFormat:
    return _here(pickle.loads(spec)).pair_format()
