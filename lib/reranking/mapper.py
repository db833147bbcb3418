"""The rerank job on one shard: pairs read, tokenised, scored, a table to publish."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.ranking import places_in_query
from ..data.reader import first_with_reason
from ..data.shards import Shard
from ..engine.mapper import Result, Tables
from ..engine.shuffle import KEY, REASON
from ..errors import InputError
from ..models.packing import offsets_of, padded_tokens
from ..models.pair_tokenizer import PairFormat, Pairs
from ..models.reranker_spec import RerankSpec
from ..models.spec import Tokens
from .config import RerankConfig
from .pair_sources import PAIR, PairSource

PAIRS_AT_ONCE = 4096
NOT_FINITE = "the model gave a score that is not finite"


@dataclass(frozen=True)
class RerankMapper:
    """A shard of pairs -> their scores."""

    config: RerankConfig
    spec: RerankSpec
    source: PairSource
    threads: int
    device: str

    def read(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        """`rows`, with the numbers of pair and query of each, and `pairs`, as token ids."""
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
        pairs = tokens.columns() | {"second": second, "query": group.filter(whole)}
        seconds = {"read": was_read - began, "tokenise": time.perf_counter() - was_read}
        rows = rows.replace_schema_metadata({"source_rows": str(source_rows)})
        return {"rows": rows, "pairs": pa.table(pairs)}, seconds

    def load(self) -> Callable[[Tables], Tables]:
        """Load the model; the returned function turns pairs into scores."""
        from ..models.reranker import Reranker

        reranker = Reranker(
            self.spec.on_this_machine(),
            dtype=self.config.model.dtype,
            device=self.device,
            token_budget=self.config.model.token_budget,
            threads=self.threads,
        )
        about = {"dtype": reranker.dtype, "mode": reranker.mode}

        def score(tables: Tables) -> Tables:
            pairs = Pairs(Tokens.of_table(tables["pairs"]), tables["pairs"]["second"].to_numpy())
            before = reranker.computed
            columns = {
                "score": reranker.score(pairs, tables["pairs"]["query"].to_numpy().astype(np.int64)),
                "tokens": np.diff(pairs.tokens.offsets).astype(np.int32),
                "truncated": pairs.tokens.truncated,
                "query": tables["pairs"]["query"],
            }
            counted = about | {"computed": str(reranker.computed - before)}
            return {"rows": tables["rows"], "scores": pa.table(columns).replace_schema_metadata(counted)}

        return score

    def lengths(self, tables: Tables) -> tuple[int, np.ndarray, np.ndarray]:
        """For a dry run: rows of the input, and of each pair its tokens [n] and whether it is cut [n]."""
        tokens = Tokens.of_table(tables["pairs"])
        return int(tables["rows"].schema.metadata[b"source_rows"]), np.diff(tokens.offsets), tokens.truncated

    def to_result(self, shard: Shard, tables: Tables) -> Result:
        """The rows as published, and their counts."""
        rows, scored, top_k = tables["rows"], tables["scores"], self.config.candidates.top_k
        pair = rows["_pair"].combine_chunks()
        score = scored["score"].combine_chunks().take(pair)
        broken = pc.invert(pc.is_finite(score)).fill_null(False)
        error = pc.if_else(broken, NOT_FINITE, rows["error"]).cast(pa.string())
        data = {name: rows[name] for name in rows.column_names if name not in ("_pair", "error")}
        data["score"] = pc.if_else(broken, pa.scalar(None, pa.float32()), score)
        if top_k:
            data["rank"] = ranks(data["score"], scored["query"].combine_chunks().take(pair))
        data["tokens"] = scored["tokens"].combine_chunks().take(pair).fill_null(0)
        data["truncated"] = scored["truncated"].combine_chunks().take(pair).fill_null(False)
        about = self.about() | {key.decode(): value.decode() for key, value in scored.schema.metadata.items()}
        computed = int(about.pop("computed"))
        table = pa.table(data | {"error": error}).replace_schema_metadata({"shoal": json.dumps(about)})
        lengths = scored["tokens"].to_numpy()
        if top_k:
            table = table.filter(pc.less_equal(pc.fill_null(table["rank"], 0), top_k))
        counts = {
            "source_rows": int(rows.schema.metadata[b"source_rows"]),
            "errors": table.num_rows - table["error"].null_count,
            "truncated": pc.sum(table["truncated"]).as_py() or 0,
            "tokens": int(lengths.sum()),
            "encoded": computed,
            "padded": padded_tokens(lengths),
        }
        return Result(table, counts)

    def about(self) -> dict[str, Any]:
        """Facts for a reader of the scores: model, template, activation, length."""
        return {
            "model": self.spec.model.name,
            "revision": self.spec.model.revision,
            "segments": list(self.spec.segments),
            "answers": list(self.spec.answers),
            "activation": self.spec.activation,
            "max_tokens": self.spec.model.max_tokens,
        }

    def _stop_if_strict(self, table: pa.Table, reasons: pa.Array) -> None:
        if self.config.run.strict and (row := first_with_reason(reasons)) is not None:
            ids = table.drop_columns([*PAIR, KEY, REASON])
            name = ", ".join(f"{column} {ids[column][row]}" for column in ids.column_names)
            raise InputError(f"{name}: {reasons[row]} (--strict is on; without it the row is kept with a reason)")


def _tokenised(pair_format: PairFormat, queries: pa.Array, passages: pa.Array) -> Pairs:
    """All pairs, some thousand at a time: as Python numbers their ids take ten times the memory."""
    starts = range(0, max(len(queries), 1), PAIRS_AT_ONCE)
    slices = [(side.slice(start, PAIRS_AT_ONCE).to_pylist() for side in (queries, passages)) for start in starts]
    parts = [pair_format(*both) for both in slices]
    tokens = [each.tokens for each in parts]
    offsets = offsets_of(np.concatenate([np.diff(each.offsets) for each in tokens]))
    ids, truncated = (np.concatenate([getattr(each, name) for each in tokens]) for name in ("ids", "truncated"))
    return Pairs(Tokens(ids, offsets, truncated), np.concatenate([each.second for each in parts]))


def ranks(scores: pa.Array, queries: pa.Array) -> pa.Array:
    """int32 [n]: 1 for the highest score of each query; equal scores in row order; null where the score is."""
    score = np.nan_to_num(scores.to_numpy(zero_copy_only=False), nan=-np.inf)
    query = pc.fill_null(queries, -1).to_numpy() + 1
    order = np.lexsort((-score, query))
    ranked = np.empty(len(order), np.int32)
    ranked[order] = places_in_query(query[order]) + 1
    return pc.if_else(pc.is_valid(scores), pa.array(ranked), pa.scalar(None, pa.int32()))


@lru_cache(maxsize=2)
def _pair_format(spec: RerankSpec) -> PairFormat:
    """Loaded once a process."""
    return spec.on_this_machine().pair_format()
