"""Embed a corpus: every row of the input as a row with its vector, exactly once."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np

from . import sharded
from .cluster import Workers, connect, decide
from .corpus import Corpus
from .embedding import EmbedConfig, Embedding
from .encoding import Encoding, resolve
from .errors import InputError, UsageError
from .ledger import Ledger, missing, open_ledger, read_manifest
from .listing import covers
from .models import ModelSpec
from .models.tokenizer import Tokenizer
from .plan import Shard, count_shards
from .progress import Progress
from .sharded import Outcome
from .storage import Folder, absolute, filesystem, parse_options
from .texts import parse_template
from .vectors import row_bytes

PART_BYTES = 128 << 20  # of vectors a part: few objects, and less than a minute's work lost with a GPU worker
TEXT_BYTES = 256 << 20  # of text a shard, so that long documents do not fill a worker's memory
SHARDS_A_WORKER = 8  # at least, so that a small corpus keeps every worker busy to the end
CHARACTERS_A_TOKEN = 4  # of English text; for sizes only
RESERVED = {"id", "chunk", "start", "end", "embedding", "tokens", "truncated", "error"}
LEAST_SHARD_ROWS = 1000  # a shard costs about 20 ms and an object
RANGES = "_int8.json"
RANGE_ROWS = 256  # rows from each of RANGE_SHARDS shards calibrate int8
RANGE_SHARDS = 16


def embed(config: EmbedConfig, say: Callable[[str], None]) -> Outcome:
    """Plan or resume, embed what is pending, audit. Raises ShoalError before anything scales, for what cannot work."""
    check(config)
    storage = parse_options(config.storage_option)
    encoding = resolve(config)
    config = replace(config, text_template=config.text_template or encoding.text_template)
    chunk_size = chunk_room(config, encoding)
    folder = Folder(absolute(config.output), storage)
    folder.probe()
    connected: list[Workers] = []

    def workers() -> Workers:
        if not connected:
            connect()
            connected.append(decide(config, encoding.spec.weight_bytes))
        return connected[0]

    def choose_rows(corpus: Corpus) -> int:
        return config.shard_rows or default_rows(config, encoding.spec, corpus, workers().maximum)

    about = _versions() | {"model": encoding.spec.name}
    ledger = open_ledger(
        folder, _settings(config, encoding, storage), config, storage, config.strict, choose_rows, about
    )
    total = count_shards(ledger.plan)
    pending = missing(ledger)
    progress = Progress(total, total - len(pending))
    if not pending and len(parts := read_manifest(folder)) == total:
        say(f"nothing to do: all {total} shards are in {folder.url}")
        return Outcome(parts, {}, progress)
    pool = workers()
    say(f"{encoding.spec.name} ({encoding.spec.dim} dims), {len(pending)} of {total} shards to do, {pool}")
    verb = _verb(config, encoding, ledger, storage, pool, chunk_size)
    if config.output_dtype == "int8":
        verb = replace(verb, ranges=_ranges(verb, ledger, pool, say))
    return sharded.run(verb, ledger, pool, progress, pending)


def check(config: EmbedConfig) -> None:
    """Options that cannot go together. Raises UsageError."""
    if taken := RESERVED & set(config.keep_columns):
        raise UsageError(f"--keep-columns {taken.pop()}: the output has a column of that name of its own. Rename it")
    if covers(config.input, config.output, parse_options(config.storage_option)):
        raise UsageError(f"--output {config.output} lies in --input {config.input}: its parts would be read as input")
    if config.chunk_tokens and config.chunk_overlap >= config.chunk_tokens:
        raise UsageError(
            f"--chunk-overlap {config.chunk_overlap} must be less than --chunk-tokens {config.chunk_tokens}"
        )
    if config.text_template is not None:
        parse_template(config.text_template)


def chunk_room(config: EmbedConfig, encoding: Encoding) -> int:
    """Tokens of text a chunk, beside prompt and special tokens; 0 without --chunk-tokens. Raises UsageError."""
    if not config.chunk_tokens:
        return 0
    tokenizer = Tokenizer(encoding.spec)
    prompt = len(tokenizer([encoding.prompt]).ids) - tokenizer.special if encoding.prompt else 0
    room = min(config.chunk_tokens, tokenizer.limit - prompt)
    if room < 8 or config.chunk_overlap >= room:
        raise UsageError(
            f"--chunk-tokens {config.chunk_tokens} with --chunk-overlap {config.chunk_overlap}: the model takes "
            f"{encoding.spec.max_tokens} tokens, prompt and special ones leave {room} for a chunk. It must be 8 at least, and "
            "more than the overlap"
        )
    return room


def _verb(
    config: EmbedConfig,
    encoding: Encoding,
    ledger: Ledger,
    storage: Mapping[str, Any],
    workers: Workers,
    chunk_size: int,
) -> Embedding:
    template = config.text_template
    return Embedding(
        config=config,
        spec=encoding.spec,
        prompt=encoding.prompt,
        template=tuple(parse_template(template)) if template else (("", config.text_column),),
        id_column=ledger.id_column,
        columns=ledger.columns,
        storage=storage,
        threads=workers.threads,
        chunk_size=chunk_size,
        device="cuda" if workers.gpus else "cpu",
    )


def _settings(config: EmbedConfig, encoding: Encoding, storage: Mapping[str, Any]) -> dict[str, Any]:
    """What fixes the rows and their vectors. A run with other settings is another run."""
    fs, path = filesystem(config.input, storage)
    model = {f"model {k}": v for k, v in vars(encoding.spec).items() if k not in ("name", "path", "revision")}
    return model | {
        "verb": "embed",
        "input": fs.unstrip_protocol(path),
        "text": config.text_template or f"{{{config.text_column}}}",
        "id_column": config.id_column,
        "keep_columns": list(config.keep_columns),
        "limit": config.limit,
        "prompt": encoding.prompt,
        "dtype": config.dtype,
        "output_dtype": config.output_dtype,
        "chunk_tokens": config.chunk_tokens,
        "chunk_overlap": config.chunk_overlap,
        "shard_rows": config.shard_rows,
        "revision": encoding.spec.revision,
    }


def default_rows(config: EmbedConfig, spec: ModelSpec, corpus: Corpus, workers: int) -> int:
    rows_a_text = max(1.0, corpus.row_bytes / CHARACTERS_A_TOKEN / config.chunk_tokens) if config.chunk_tokens else 1.0
    by_output = int(PART_BYTES / row_bytes(spec.dim, config.output_dtype) / rows_a_text)
    by_text = int(TEXT_BYTES / max(corpus.row_bytes, 1.0))
    by_workers = int(corpus.rows / (SHARDS_A_WORKER * workers))
    return max(1, min(by_output, by_text, max(by_workers, LEAST_SHARD_ROWS)))


def _ranges(
    verb: Embedding, ledger: Ledger, workers: Workers, say: Callable[[str], None]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """int8 ranges of the run: made once from a sample spread over the shards, kept in `_int8.json`, used by all."""
    if not ledger.folder.exists(RANGES):
        say("calibrating int8 ranges")
        shards = heads(ledger, RANGE_SHARDS, RANGE_ROWS)
        bundles = sharded.sample(replace(verb, config=replace(verb.config, output_dtype="float32")), shards, workers)
        vectors = np.concatenate([verb.matrix(b["vectors"]) for b in bundles]) if bundles else np.empty((0, 0))
        if not len(vectors):
            raise InputError("no text in the sample that int8 ranges are calibrated on. Use --output-dtype float16")
        ranges = [vectors.min(axis=0).tolist(), vectors.max(axis=0).tolist()]
        ledger.folder.claim(RANGES, json.dumps(ranges).encode())
    low, high = json.loads(ledger.folder.read(RANGES))
    return tuple(low), tuple(high)


def heads(ledger: Ledger, count: int, rows: int) -> list[Shard]:
    """The first rows of `count` shards spread evenly over the plan."""
    last = count_shards(ledger.plan) - 1
    numbers = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
    return [head(shard, rows) for shard in ledger.shards(numbers)]


def head(shard: Shard, rows: int) -> Shard:
    piece = shard.slices[0]
    # A byte range is cut at about 1 KiB a row; too many or few rows of a sample do no harm.
    units = rows if piece.rows >= 0 else rows << 10
    stop = min(piece.stop, piece.start + units)
    return Shard(shard.number, (replace(piece, stop=stop, rows=stop - piece.start if piece.rows >= 0 else -1),))


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("ray", "torch", "transformers", "pyarrow")}
