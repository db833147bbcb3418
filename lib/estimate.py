"""What a run would be, before it is: shards, tokens from a sample, memory, hours and dollars."""

import time
from dataclasses import dataclass, replace

import numpy as np

from .cluster import Workers, connect, decide, worker_memory
from .corpus import first_rows, list_files, measure_files, wanted_columns
from .embed import check, chunk_room, default_rows, head
from .embedding import EmbedConfig
from .encoding import resolve
from .models import ModelSpec, Tokens
from .models.tokenizer import Tokenizer
from .plan import Shard, count_shards, cut, shards
from .progress import duration
from .rows import read
from .storage import parse_options
from .texts import chunk_spans, compose, parse_template
from .vectors import row_bytes

SAMPLE_SHARDS, SAMPLE_ROWS = 8, 128
TIMED_SECONDS = 4.0


@dataclass(frozen=True)
class Estimate:
    """A plan in numbers. `tokens_per_second`: of one worker, measured here; None where this machine is not like one."""

    files: int
    rows: float
    shards: int
    shard_rows: int
    tokens_a_row: float
    truncated_share: float
    output_bytes: float
    worker_bytes: int
    workers: Workers
    tokens_per_second: float | None

    @property
    def tokens(self) -> float:
        return self.rows * self.tokens_a_row

    @property
    def seconds(self) -> float | None:
        rate = self.tokens_per_second
        return None if not rate else self.tokens / (rate * self.workers.maximum)

    def lines(self, price_per_hour: float | None) -> list[str]:
        said = [
            f"plan      {self.rows:,.0f} rows in {self.files:,} files, {self.shards:,} shards of about {self.shard_rows:,} rows",
            f"tokens    about {self.tokens:,.0f} ({self.tokens_a_row:.0f} a row, {self.truncated_share:.1%} of rows cut)",
            f"output    about {self.output_bytes / 2**30:,.2f} GiB of vectors",
            f"workers   {self.workers}, about {self.worker_bytes / 2**30:.1f} GiB of memory each",
        ]
        if self.seconds is None:
            return [
                *said,
                "time      unknown: run --dry-run on a machine like the workers, or a first run with --limit 10000",
            ]
        assert self.tokens_per_second
        said.append(
            f"time      about {duration(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s a worker, measured here"
        )
        if price_per_hour is not None:
            dollars = self.seconds / 3600 * self.workers.maximum * price_per_hour
            said.append(f"cost      about ${dollars:,.2f} at ${price_per_hour:g} a worker-hour")
        return said


def estimate(config: EmbedConfig) -> Estimate:
    """Measure the input and a sample of it; nothing is written. Raises ShoalError as the run itself would."""
    check(config)
    storage = parse_options(config.storage_option)
    encoding = resolve(config)
    config = replace(config, text_template=config.text_template or encoding.text_template)
    spec = encoding.spec
    corpus = measure_files(list_files(config, storage), config, storage, config.strict)
    if config.limit:
        corpus = first_rows(corpus, config.limit, storage)
    connect()
    workers = decide(config, spec.weight_bytes)
    shard_rows = config.shard_rows or default_rows(config, spec, corpus, workers.maximum)
    plan = cut(corpus, shard_rows)
    count = count_shards(plan)
    numbers = (
        sorted({round(i * (count - 1) / max(SAMPLE_SHARDS - 1, 1)) for i in range(SAMPLE_SHARDS)}) if count else []
    )
    template = parse_template(config.text_template) if config.text_template else [("", config.text_column)]

    def texts(shard: Shard) -> list[str]:
        table = read(head(shard, SAMPLE_ROWS), wanted_columns(config), corpus.schema, storage)
        return [encoding.prompt + text for text in compose(table, template)[0].to_pylist() if text]

    sampled = [text for shard in shards(plan, numbers) for text in texts(shard)]
    tokenizer, texts_sampled = Tokenizer(spec), len(sampled)
    size = chunk_room(config, encoding)
    if size:
        sampled = [
            text[a:b]
            for text in sampled
            for a, b in chunk_spans(text, tokenizer.spans(text), size, config.chunk_overlap)
        ]
    tokens = tokenizer(sampled)
    lengths = np.diff(tokens.offsets)
    chunks = len(sampled) / max(texts_sampled, 1)
    measured = _rate(config, spec, workers, tokens) if len(lengths) else None
    return Estimate(
        files=len(corpus.files),
        rows=corpus.rows,
        shards=count,
        shard_rows=shard_rows,
        tokens_a_row=float(lengths.mean()) * chunks if len(lengths) else 0.0,
        truncated_share=float(tokens.truncated.mean()) if len(lengths) else 0.0,
        output_bytes=corpus.rows * chunks * row_bytes(spec.dim, config.output_dtype),
        worker_bytes=worker_memory(spec.weight_bytes),
        workers=workers,
        tokens_per_second=measured,
    )


def _rate(config: EmbedConfig, spec: ModelSpec, workers: Workers, tokens: Tokens) -> float | None:
    """Tokens a second of one worker, if this machine can be one."""
    import torch

    if workers.gpus and not torch.cuda.is_available():
        return None
    from .models.encoder import Encoder

    device = "cuda" if workers.gpus else "cpu"
    encoder = Encoder(
        spec, dtype=config.dtype, device=device, token_budget=config.token_budget, threads=workers.threads
    )
    encoder.encode(_part(tokens, 0, 8))  # the first call sets things up
    began, seen = time.perf_counter(), 0
    for start in range(0, len(tokens.truncated), 64):
        part = _part(tokens, start, start + 64)
        encoder.encode(part)
        seen += len(part.ids)
        if time.perf_counter() - began > TIMED_SECONDS:
            break
    return seen / (time.perf_counter() - began)


def _part(tokens: Tokens, start: int, stop: int) -> Tokens:
    offsets = tokens.offsets[start : stop + 1]
    return Tokens(tokens.ids[offsets[0] : offsets[-1]], offsets - offsets[0], tokens.truncated[start:stop])
