"""Embed a corpus: every row of the input as a row with its vector, exactly once."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.corpus import Corpus, list_files, measure
from ..data.shards import sample_shards
from ..data.texts import parse_template
from ..data.vectors import row_bytes
from ..engine import executor
from ..engine.dry_run import Estimate, estimate
from ..engine.executor import Outcome
from ..engine.job import Job, carry_out, even_rows, refuse_nested
from ..engine.lease import parse_slice
from ..engine.run import Run
from ..engine.workers import WorkerPlan
from ..errors import InputError, UsageError
from ..models.encoder_options import ResolvedEncoder, resolve_encoder
from ..models.files import check_bge_m3
from ..models.spec import ModelSpec
from ..models.tokenizer import Tokenizer
from ..storage.filesystem import filesystem, parse_options
from .mapper import DENSE, MULTI, OUTPUTS, EmbedConfig, EmbedMapper

log = logging.getLogger("shoal")

PART_BYTES = 128 << 20  # of vectors a part: few objects, and less than a minute's work lost with a GPU worker
CHARACTERS_A_TOKEN = 4  # of English text; for sizes only
RESERVED = {"id", "chunk", "start", "end", "embedding", "sparse", "multi_vector", "tokens", "truncated", "error"}
RANGES = "_int8.json"
RANGE_ROWS = 256  # rows from each of RANGE_SHARDS shards calibrate int8
RANGE_SHARDS = 16


def embed(config: EmbedConfig) -> Outcome:
    """Plan or resume, embed what is pending, audit. Raises ShoalError before anything scales, for what cannot work."""
    config, encoding, job = prepared(config)

    def calibrated(verb: EmbedMapper, ledger: Run, workers: WorkerPlan) -> EmbedMapper:
        return replace(verb, ranges=_ranges(verb, ledger, workers)) if config.output_dtype == "int8" else verb

    job = replace(job, calibrated=calibrated)
    return carry_out(job, config, lambda corpus, workers: default_rows(config, encoding.spec, corpus, workers))


def dry_run(config: EmbedConfig) -> Estimate:
    """What a run would be; nothing is written. Raises ShoalError as the run itself would."""
    config, encoding, job = prepared(config)
    storage = parse_options(config.storage_option)
    plain = replace(job, verb=lambda ledger, workers: _uncalibrated(job.verb(ledger, workers)))
    return estimate(
        plain,
        config,
        measure(list_files(config, storage), config, storage, config.strict),
        lambda corpus, workers: default_rows(config, encoding.spec, corpus, workers),
        row_bytes(encoding.spec.dim, config.output_dtype),
    )


def prepared(config: EmbedConfig) -> tuple[EmbedConfig, ResolvedEncoder, Job]:
    """The config with what its recipe adds, its model's files read, and the job. Raises UsageError or ModelError."""
    check(config)
    storage = parse_options(config.storage_option)
    encoding = resolve_encoder(config)
    config = replace(config, text_template=config.text_template or encoding.text_template)
    chunk_size = chunk_room(config, encoding)
    if set(config.outputs) != {DENSE}:
        check_bge_m3(Path(encoding.spec.folder))
    job = Job(
        said=f"{encoding.spec.name} ({encoding.spec.dim} dims)",
        settings=_settings(config, encoding, storage),
        verb=lambda ledger, workers: _verb(config, encoding, ledger, storage, workers, chunk_size),
        model=encoding.spec.name,
        weight_bytes=encoding.spec.weight_bytes,
        share=parse_slice(config.slice),
    )
    return config, encoding, job


def check(config: EmbedConfig) -> None:
    """Options that cannot go together. Raises UsageError."""
    if taken := RESERVED & set(config.keep_columns):
        raise UsageError(f"--keep-columns {taken.pop()}: the output has a column of that name of its own. Rename it")
    if unknown := set(config.outputs) - set(OUTPUTS):
        raise UsageError(f"--outputs {unknown.pop()}: choose from {', '.join(OUTPUTS)}")
    if DENSE not in config.outputs:
        raise UsageError(f"--outputs {','.join(config.outputs)}: dense is always made; name it too")
    refuse_nested(config.input, config)
    if config.chunk_tokens and config.chunk_overlap >= config.chunk_tokens:
        raise UsageError(
            f"--chunk-overlap {config.chunk_overlap} must be less than --chunk-tokens {config.chunk_tokens}"
        )
    if config.text_template is not None:
        parse_template(config.text_template)


def chunk_room(config: EmbedConfig, encoding: ResolvedEncoder) -> int:
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
    encoding: ResolvedEncoder,
    ledger: Run,
    storage: Mapping[str, Any],
    workers: WorkerPlan,
    chunk_size: int,
) -> EmbedMapper:
    template = config.text_template
    return EmbedMapper(
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


def _settings(config: EmbedConfig, encoding: ResolvedEncoder, storage: Mapping[str, Any]) -> dict[str, Any]:
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
        "outputs": list(config.outputs),
        "chunk_tokens": config.chunk_tokens,
        "chunk_overlap": config.chunk_overlap,
        "shard_rows": config.shard_rows,
        "revision": encoding.spec.revision,
    }


def default_rows(config: EmbedConfig, spec: ModelSpec, corpus: Corpus, workers: int) -> int:
    rows_a_text = max(1.0, corpus.row_bytes / CHARACTERS_A_TOKEN / config.chunk_tokens) if config.chunk_tokens else 1.0
    bytes_a_row = row_bytes(spec.dim, config.output_dtype)
    if MULTI in config.outputs:
        tokens = min(spec.max_tokens, corpus.row_bytes / CHARACTERS_A_TOKEN)
        bytes_a_row += int(tokens * row_bytes(spec.hidden_size, "float16"))
    by_output = int(PART_BYTES / bytes_a_row / rows_a_text)
    return even_rows(corpus, workers, most=by_output)


def _uncalibrated(verb: EmbedMapper) -> EmbedMapper:
    """The verb with float32 vectors, which need no ranges."""
    return replace(verb, config=replace(verb.config, output_dtype="float32"))


def _ranges(verb: EmbedMapper, ledger: Run, workers: WorkerPlan) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """int8 ranges of the run: made once from a sample spread over the shards, kept in `_int8.json`, used by all."""
    if not ledger.folder.exists(RANGES):
        log.info("calibrating int8 ranges")
        shards = sample_shards(ledger.plan, RANGE_SHARDS, RANGE_ROWS)
        bundles = executor.sample(_uncalibrated(verb), shards, workers)
        vectors = np.concatenate([verb.matrix(b["vectors"]) for b in bundles]) if bundles else np.empty((0, 0))
        if not len(vectors):
            raise InputError("no text in the sample that int8 ranges are calibrated on. Use --output-dtype float16")
        ranges = [vectors.min(axis=0).tolist(), vectors.max(axis=0).tolist()]
        ledger.folder.claim(RANGES, json.dumps(ranges).encode())
    low, high = json.loads(ledger.folder.read(RANGES))
    return tuple(low), tuple(high)
