"""The embed job on one shard: rows read, texts tokenised, vectors computed, a table to publish."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.chunks import chunk_spans
from ..data.reader import first_with_reason, read_rows, row_ids
from ..data.shards import Shard
from ..data.texts import compose
from ..data.vectors import as_matrix, quantise, to_column
from ..engine.mapper import Result, Tables
from ..errors import InputError
from ..models.encoder_options import ResolvedEncoder
from ..models.packing import padded_tokens
from ..models.spec import ModelSpec, Tokens, on_this_machine
from ..models.tokenizer import Tokenizer
from .config import DENSE, MULTI, SPARSE, EmbedConfig

if TYPE_CHECKING:
    from ..models.encoder import Encoder

NOT_FINITE = "the model gave a vector that is not finite"


@dataclass(frozen=True)
class TextRows:
    """Reads the rows of a shard and composes their texts. storage: fsspec options."""

    template: tuple[tuple[str, str | None], ...]
    id_column: str | None
    carried: tuple[str, ...]
    columns: pa.Schema
    storage: Mapping[str, Any]
    strict: bool

    def read(self, shard: Shard) -> tuple[pa.Table, pa.Array]:
        """Columns `_row`, `error`, `id` and the carried ones; and the texts, large_string, null where there is an error.

        Raises InputError at the first error where strict.
        """
        names = [*(name for _, name in self.template), self.id_column, *self.carried]
        table = read_rows(shard, names, self.columns, self.storage)
        texts, reasons = compose(table, self.template)
        reasons = pc.coalesce(table["_error"], reasons).combine_chunks()
        if self.strict and (row := first_with_reason(reasons)) is not None:
            raise InputError(
                f"{table['_source'][row]}: {reasons[row]} (--strict is on; without it the row is kept with a reason)"
            )
        rows = pa.table({"_row": np.arange(len(table)), "error": reasons, "id": row_ids(table, self.id_column)})
        for name in self.carried:
            rows = rows.append_column(name, table[name])
        return rows, pc.if_else(pc.is_null(reasons), texts, pa.scalar(None, pa.large_string()))


@dataclass(frozen=True)
class EmbedMapper:
    """A shard of texts -> its vectors. Equal texts of a shard are encoded once."""

    rows: TextRows
    config: EmbedConfig
    encoder: ResolvedEncoder
    chunk_size: int  # tokens of text a chunk, prompt and special tokens apart; 0: texts are not chunked
    threads: int
    device: str
    ranges: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # of int8: least and greatest of each dimension

    def read(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        """`rows`, with an index into unique texts, and `tokens`: those texts as token ids."""
        began = time.perf_counter()
        rows, texts = self.rows.read(shard)
        was_read = time.perf_counter()
        tokenizer = _tokenizer(self.encoder.spec)
        if self.chunk_size:
            texts, rows = _chunked(texts, rows, self._cut)
        unique = pc.dictionary_encode(texts)
        tokens = tokenizer([self.encoder.prompt + text for text in unique.dictionary.to_pylist()])
        rows = rows.append_column("_unique", unique.indices)
        seconds = {"read": was_read - began, "tokenise": time.perf_counter() - was_read}
        return {"rows": rows, "tokens": pa.table(tokens.columns())}, seconds

    def _cut(self, text: str) -> list[tuple[int, int]]:
        """The characters of a text's chunks."""
        tokenizer, prompt = _tokenizer(self.encoder.spec), self.encoder.prompt

        def count(piece: str) -> int:
            return len(tokenizer.contents([prompt + piece])[0]) - prompt_tokens

        prompt_tokens = tokenizer.tokens_of_prompt(prompt)
        return chunk_spans(text, tokenizer.spans(text), self.chunk_size, self.config.chunk_overlap, count)

    def load(self) -> Callable[[Tables], Tables]:
        """Load the model; the returned function turns token ids into vectors."""
        from ..models.encoder import Encoder

        encoder = Encoder(
            on_this_machine(self.encoder.spec),
            dtype=self.config.model.dtype,
            device=self.device,
            token_budget=self.config.model.token_budget,
            threads=self.threads,
        )
        skip = _tokenizer(self.encoder.spec).prompt_tokens(self.encoder.prompt)
        encode_more = self._more_outputs(encoder)
        ranges = None if self.ranges is None else np.array(self.ranges, np.float32)
        about = {"dtype": encoder.dtype, "mode": encoder.mode}

        def encode(tables: Tables) -> Tables:
            tokens = Tokens.of_table(tables["tokens"])
            vectors, more = encode_more(tokens, skip) if encode_more else (encoder.encode(tokens, skip), {})
            stored, reasons = stored_vectors(vectors, self.config.output_dtype, ranges)
            columns = {
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1]),
                "reason": reasons,
                "tokens": np.diff(tokens.offsets).astype(np.int32),
                "truncated": tokens.truncated,
            } | more
            return {"rows": tables["rows"], "vectors": pa.table(columns).replace_schema_metadata(about)}

        return encode

    def _more_outputs(
        self, encoder: "Encoder"
    ) -> Callable[[Tokens, int], tuple[np.ndarray, dict[str, pa.Array]]] | None:
        """A function for dense vectors and the other columns of --outputs; None where there are no others."""
        others = [name for name in self.config.outputs if name != DENSE]
        if not others:
            return None
        from ..models.bge_m3 import BgeM3Head, multi_vector_column, sparse_column

        head = BgeM3Head(encoder.spec).eval().to(encoder.device)
        special = _tokenizer(self.encoder.spec).special_ids

        def encode(tokens: Tokens, skip: int) -> tuple[np.ndarray, dict[str, pa.Array]]:
            vectors, weights, multiple = encoder.encode_tokens(tokens, head, skip)
            columns = {SPARSE: sparse_column(tokens, weights, special), MULTI: multi_vector_column(tokens, multiple)}
            return vectors, {name: columns[name] for name in others}

        return encode

    def lengths(self, tables: Tables) -> tuple[int, np.ndarray, np.ndarray]:
        """For a dry run: rows of the input, and of each output row its tokens [n] and whether it is cut [n]."""
        index = tables["rows"]["_unique"].drop_null().to_numpy()
        tokens = Tokens.of_table(tables["tokens"])
        source_rows = pc.count_distinct(tables["rows"]["_row"]).as_py()
        return source_rows, np.diff(tokens.offsets)[index], tokens.truncated[index]

    def to_result(self, shard: Shard, tables: Tables) -> Result:
        """The rows as published, and their counts."""
        rows, encoded = tables["rows"], tables["vectors"]
        index = rows["_unique"].combine_chunks()
        reasons = encoded["reason"].combine_chunks().take(index)
        broken, error = pc.is_valid(reasons), pc.coalesce(reasons, rows["error"]).combine_chunks()
        lengths = encoded["tokens"].combine_chunks()
        padded = padded_tokens(lengths.take(index.drop_null()).to_numpy(zero_copy_only=False))
        tokens = lengths.take(index).fill_null(0)
        names = ("chunk", "start", "end", *self.rows.carried)
        data = {name: rows[name] for name in ("id", *names) if name in rows.column_names}
        index = pc.if_else(broken, pa.scalar(None, pa.int32()), index)
        data["embedding"] = to_column(as_matrix(encoded["vector"]), index)
        for name in (SPARSE, MULTI):
            if name in encoded.column_names:
                data[name] = encoded[name].combine_chunks().take(index)
        data["tokens"] = tokens.cast(pa.int32())
        data["truncated"] = encoded["truncated"].combine_chunks().take(index).fill_null(False)
        data["error"] = error
        about = self.about() | {key.decode(): value.decode() for key, value in encoded.schema.metadata.items()}
        table = pa.table(data).replace_schema_metadata({"shoal": json.dumps(about)})
        counts = {
            "source_rows": pc.count_distinct(rows["_row"]).as_py(),
            "errors": table.num_rows - error.null_count,
            "truncated": pc.sum(data["truncated"]).as_py() or 0,
            "tokens": pc.sum(tokens).as_py() or 0,
            "encoded": pc.sum(lengths).as_py() or 0,
            "padded": padded,
            "without_id": rows["id"].null_count,
        }
        return Result(table, counts)

    def about(self) -> dict[str, Any]:
        """Facts for a reader of the vectors: model, prompt, pooling, dimensions."""
        spec = self.encoder.spec
        return {
            "model": spec.name,
            "revision": spec.revision,
            "recipe": self.config.model.recipe,
            "pooling": list(spec.pooling),
            "bidirectional": spec.bidirectional,
            "append_eos": spec.append_eos,
            "prompt": self.encoder.prompt,
            "dim": spec.dim,
            "normalized": spec.normalize,
            "max_tokens": spec.max_tokens,
            "output_dtype": self.config.output_dtype,
            "int8_ranges": self.ranges,
        }


def stored_vectors(vectors: np.ndarray, dtype: str, ranges: np.ndarray | None) -> tuple[np.ndarray, pa.Array]:
    """The vectors as `quantise` stores them, and the reason of each that cannot be stored (string; such a vector is zeros)."""
    finite = np.isfinite(vectors).all(axis=1)
    with np.errstate(over="ignore"):
        stored = quantise(np.where(finite[:, None], vectors, 0), dtype, ranges)
    fits = np.isfinite(stored).all(axis=1)
    stored[~fits] = 0
    too_large = pc.if_else(pa.array(fits), None, f"a number of the vector is too large for {dtype}").cast(pa.string())
    return stored, pc.if_else(pa.array(finite), too_large, NOT_FINITE)


def _chunked(texts: pa.Array, rows: pa.Table, cut: Callable[[str], list[tuple[int, int]]]) -> tuple[pa.Array, pa.Table]:
    """Texts cut into chunks, and their rows, each repeated once a chunk with `chunk`, `start` and `end` (characters)."""
    owners: list[int] = []
    chunks: list[tuple[int, int | None, int | None]] = []
    chunk_texts: list[str | None] = []
    for row, text in enumerate(texts.to_pylist()):
        for number, (start, end) in enumerate([(None, None)] if text is None else cut(text)):
            owners.append(row)
            chunks.append((number, start, end))
            chunk_texts.append(None if text is None else text[start:end])
    rows = rows.take(pa.array(owners, pa.int64()))
    for place, name in enumerate(("chunk", "start", "end")):
        rows = rows.append_column(name, pa.array([chunk[place] for chunk in chunks], pa.int32()))
    return pa.array(chunk_texts, pa.large_string()), rows


@lru_cache(maxsize=2)
def _tokenizer(spec: ModelSpec) -> Tokenizer:
    """Loaded once a process."""
    return Tokenizer(on_this_machine(spec))
