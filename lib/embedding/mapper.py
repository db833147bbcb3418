"""What embedding does with one shard: rows read, texts tokenised, vectors computed, a table to publish."""

import json
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.reader import read_rows
from ..data.shards import Shard
from ..data.texts import as_text, chunk_spans, compose
from ..data.vectors import OutputDtype, quantise, to_column
from ..engine.job import SharedRunOptions
from ..engine.mapper import NOT_FINITE, Tables
from ..errors import InputError
from ..models.encoder_options import ModelOptions
from ..models.packing import padding_waste
from ..models.spec import ModelSpec, Tokens, on_this_machine
from ..models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..models.encoder import Encoder

OUTPUTS = DENSE, SPARSE, MULTI = "dense", "sparse", "multi_vector"


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(SharedRunOptions, ModelOptions):
    """Everything `jobs/embed_corpus.py` can be told."""

    chunk_tokens: int | None = field(
        default=None,
        metadata={"help": "Cut texts into chunks of N tokens, a row each, instead of truncating.", "min": 8},
    )
    chunk_overlap: int = field(default=0, metadata={"help": "Tokens a chunk shares with the one before.", "min": 0})
    outputs: tuple[str, ...] = field(
        default=("dense",), metadata={"help": "dense, and of M3 checkpoints sparse and multi_vector, by commas."}
    )
    output_dtype: OutputDtype = field(
        default="float32", metadata={"help": "Type of the stored vectors. int8 ranges are calibrated once a run."}
    )


@dataclass(frozen=True)
class EmbedMapper:
    """The verb that `sharded` runs: what happens to one shard. Travels to every task and actor."""

    config: EmbedConfig
    spec: ModelSpec
    prompt: str
    template: tuple[tuple[str, str | None], ...]
    id_column: str | None
    columns: pa.Schema
    storage: Mapping[str, Any]
    threads: int
    device: str
    chunk_size: int = 0  # tokens of text a chunk, prompt and special tokens apart; 0: texts are not chunked
    ranges: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        """Rows with an index into unique texts, and those texts as token ids."""
        began = time.perf_counter()
        names = [*(name for _, name in self.template), self.id_column, *self.config.keep_columns]
        table = read_rows(shard, [name for name in dict.fromkeys(names) if name], self.columns, self.storage)
        texts, reasons = compose(table, self.template)
        reasons = pc.coalesce(table["_error"], reasons).combine_chunks()
        self._stop_if_strict(table, reasons)
        was_read = time.perf_counter()
        tokenizer = _tokenizer(self.spec)
        rows = pa.table({"_row": np.arange(len(table)), "error": reasons, "id": self._ids(table)})
        for name in self.config.keep_columns:
            rows = rows.append_column(name, table[name])
        texts = pc.if_else(pc.is_null(reasons), texts, pa.scalar(None, pa.large_string()))
        if self.chunk_size:
            texts, rows = _chunked(texts, rows, tokenizer, self.chunk_size, self.config.chunk_overlap)
        unique = pc.dictionary_encode(texts)
        tokens = tokenizer([self.prompt + text for text in unique.dictionary.to_pylist()])
        rows = rows.append_column("_unique", unique.indices)
        encoded = pa.table(
            {"ids": pa.LargeListArray.from_arrays(tokens.offsets, tokens.ids), "truncated": tokens.truncated}
        )
        seconds = {"read": was_read - began, "tokenise": time.perf_counter() - was_read}
        return {"rows": rows, "tokens": encoded}, seconds

    def worker(self) -> Callable[[Tables], Tables]:
        """Load the model; what is returned turns token ids into vectors."""
        from ..models.encoder import Encoder

        encoder = Encoder(
            on_this_machine(self.spec),
            dtype=self.config.dtype,
            device=self.device,
            token_budget=self.config.token_budget,
            threads=self.threads,
        )
        skip = _tokenizer(self.spec).prompt_tokens(self.prompt)
        more = self._more_outputs(encoder)
        ranges = None if self.ranges is None else np.array(self.ranges, np.float32)
        made = {"dtype": encoder.dtype, "mode": encoder.mode}

        def work(bundle: Tables) -> Tables:
            tokens = to_tokens(bundle["tokens"])
            vectors, columns = more(tokens, skip) if more else (encoder.encode(tokens, skip), {})
            finite = np.isfinite(vectors).all(axis=1)
            stored = quantise(np.where(finite[:, None], vectors, 0), self.config.output_dtype, ranges)
            flat = pa.array(stored.reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, stored.shape[1])
            facts = {
                "vector": column,
                "finite": pa.array(finite),
                "tokens": np.diff(tokens.offsets).astype(np.int32),
                "truncated": tokens.truncated,
            } | columns
            return {"rows": bundle["rows"], "vectors": pa.table(facts).replace_schema_metadata(made)}

        return work

    def _more_outputs(
        self, encoder: "Encoder"
    ) -> Callable[[Tokens, int], tuple[np.ndarray, dict[str, pa.Array]]] | None:
        """Vectors, and the columns asked for beside them; None where there are none."""
        wanted = [name for name in self.config.outputs if name != DENSE]
        if not wanted:
            return None
        from ..models.bge_m3 import BgeM3Head, multi_vector_column, sparse_column

        head = BgeM3Head(on_this_machine(self.spec)).eval().to(encoder.device)
        special = _tokenizer(self.spec).special_ids

        def more(tokens: Tokens, skip: int) -> tuple[np.ndarray, dict[str, pa.Array]]:
            vectors, weights, multiple = encoder.encode_tokens(tokens, head, skip)
            made = {SPARSE: sparse_column(tokens, weights, special), MULTI: multi_vector_column(tokens, multiple)}
            return vectors, {name: made[name] for name in wanted}

        return more

    def lengths(self, bundle: Tables) -> tuple[int, np.ndarray, np.ndarray]:
        """For an estimate: rows read, and of each row made its tokens and whether it is cut."""
        index = bundle["rows"]["_unique"].drop_null().to_numpy()
        tokens = to_tokens(bundle["tokens"])
        return (
            pc.count_distinct(bundle["rows"]["_row"]).as_py(),
            np.diff(tokens.offsets)[index],
            tokens.truncated[index],
        )

    def finish(self, shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
        """The rows as published, and their counts."""
        rows, facts = bundle["rows"], bundle["vectors"]
        index = rows["_unique"].combine_chunks()
        broken = pc.and_(pc.invert(facts["finite"].combine_chunks().take(index)), pc.is_valid(index)).fill_null(False)
        error = pc.if_else(broken, f"the model gave a vector {NOT_FINITE}", rows["error"]).cast(pa.string())
        lengths = facts["tokens"].combine_chunks()
        tokens = lengths.take(index).fill_null(0)
        data = {"id": rows["id"]}
        for name in ("chunk", "start", "end", *self.config.keep_columns):
            if name in rows.column_names:
                data[name] = rows[name]
        index = pc.if_else(broken, pa.scalar(None, pa.int32()), index)
        data["embedding"] = to_column(self.matrix(facts), index)
        for name in (SPARSE, MULTI):
            if name in facts.column_names:
                data[name] = facts[name].combine_chunks().take(index)
        data["tokens"] = tokens.cast(pa.int32())
        data["truncated"] = facts["truncated"].combine_chunks().take(index).fill_null(False)
        data["error"] = error
        table = pa.table(data).replace_schema_metadata({"shoal": json.dumps(self.about(facts.schema.metadata))})
        encoded = pc.sum(lengths).as_py() or 0
        waste = padding_waste(lengths.take(index.drop_null()).to_numpy(zero_copy_only=False))
        total = pc.sum(tokens).as_py() or 0
        counts = {
            "rows": table.num_rows,
            "source_rows": pc.count_distinct(rows["_row"]).as_py(),
            "errors": table.num_rows - error.null_count,
            "truncated": pc.sum(data["truncated"]).as_py() or 0,
            "tokens": total,
            "encoded": encoded,
            "padded": round(total / (1 - waste)) if waste < 1 else total,
        }
        return table, counts

    def about(self, made: Mapping[bytes, bytes] | None = None) -> dict[str, Any]:
        """What a reader of the vectors must know."""
        spec = self.spec
        return {
            "model": spec.name,
            "revision": spec.revision,
            "recipe": self.config.recipe,
            "pooling": list(spec.pooling),
            "bidirectional": spec.bidirectional,
            "append_eos": spec.append_eos,
            "prompt": self.prompt,
            "dim": spec.dim,
            "normalized": spec.normalize,
            "max_tokens": spec.max_tokens,
            "output_dtype": self.config.output_dtype,
            "int8_ranges": self.ranges,
        } | {key.decode(): value.decode() for key, value in (made or {}).items()}

    def _ids(self, table: pa.Table) -> pa.Array | pa.ChunkedArray:
        if self.id_column is None:
            return table["_source"]
        column = table[self.id_column]
        return as_text(column)[0] if pa.types.is_large_string(column.type) else column

    def matrix(self, facts: pa.Table) -> np.ndarray:
        column = facts["vector"].combine_chunks()
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)

    def _stop_if_strict(self, table: pa.Table, reasons: pa.Array) -> None:
        if self.config.strict and reasons.null_count < len(reasons):
            row = pc.index(pc.is_valid(reasons), True).as_py()
            raise InputError(
                f"{table['_source'][row]}: {reasons[row]} (--strict is on; without it the row is kept with a reason)"
            )


def to_tokens(table: pa.Table) -> Tokens:
    """The `tokens` table of a bundle as views of its buffers."""
    ids = table["ids"].combine_chunks()
    offsets = ids.offsets.to_numpy()
    flat = ids.values.to_numpy()[offsets[0] : offsets[-1]]
    return Tokens(flat, offsets - offsets[0], table["truncated"].combine_chunks().to_numpy(zero_copy_only=False))


def _chunked(
    texts: pa.Array, rows: pa.Table, tokenizer: Tokenizer, size: int, overlap: int
) -> tuple[pa.Array, pa.Table]:
    """Texts cut into chunks, and their rows, each repeated once a chunk with `chunk`, `start` and `end` (characters)."""
    owners: list[int] = []
    chunks: list[tuple[int, int | None, int | None]] = []
    pieces: list[str | None] = []
    for row, text in enumerate(texts.to_pylist()):
        spans = [(None, None)] if text is None else chunk_spans(text, tokenizer.spans(text), size, overlap)
        for number, (start, end) in enumerate(spans):
            owners.append(row)
            chunks.append((number, start, end))
            pieces.append(None if text is None else text[start:end])
    rows = rows.take(pa.array(owners, pa.int64()))
    for place, name in enumerate(("chunk", "start", "end")):
        rows = rows.append_column(name, pa.array([chunk[place] for chunk in chunks], pa.int32()))
    return pa.array(pieces, pa.large_string()), rows


def _tokenizer(spec: ModelSpec) -> Tokenizer:
    """Loaded once a process."""
    return _tokenizer_of(pickle.dumps(spec))


@lru_cache(maxsize=2)
def _tokenizer_of(spec: bytes) -> Tokenizer:
    return Tokenizer(on_this_machine(pickle.loads(spec)))
