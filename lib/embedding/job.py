"""The driver of the embed job: every row of the input as a row with its vector, exactly once."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..data.corpus import Corpus
from ..data.shards import sample_shards
from ..data.texts import parse_template
from ..data.vectors import as_matrix, row_bytes
from ..engine import executor
from ..engine.dry_run import Estimate, estimate
from ..engine.executor import Outcome
from ..engine.job import Job, even_rows, run_job, stage_folder
from ..engine.lease import parse_slice
from ..engine.planner import CorpusPlanner
from ..engine.run import Run
from ..engine.workers import WorkerPlan, WorkerRequest
from ..errors import InputError
from ..models.encoder_options import ResolvedEncoder, resolve_encoder
from ..models.files import check_bge_m3
from ..storage.folder import Folder
from .config import DENSE, MULTI, EmbedConfig, check, chunk_room, settings
from .mapper import EmbedMapper, TextRows

log = logging.getLogger("shoal")

PART_BYTES = 128 << 20  # of vectors a part: few objects, and less than a minute's work lost with a GPU worker
CHARACTERS_A_TOKEN = 4  # of English text; for sizes only
RANGES_FILE = "_int8.json"
RANGE_ROWS = 256  # rows from each of RANGE_SHARDS shards calibrate int8
RANGE_SHARDS = 16


def embed(config: EmbedConfig) -> Outcome:
    """Plan or resume, embed what is pending, audit. Raises ShoalError before anything scales, for what cannot work."""
    resolved = resolve(config)
    return run_job(resolved.job(), config.run.folder, resolved.planner())


def dry_run(config: EmbedConfig) -> Estimate:
    """The size and cost of a run; nothing is written. Raises ShoalError as the run itself would."""
    resolved = resolve(config)
    uncalibrated = replace(
        resolved, config=replace(resolved.config, output_dtype="float32")
    )  # int8 ranges are not known yet
    stored = row_bytes(resolved.encoder.spec.dim, config.output_dtype)
    return estimate(uncalibrated.job(), config.run.folder, resolved.planner(), stored)


@dataclass(frozen=True)
class ResolvedEmbedding:
    """A config that was checked, with its model's files read. config: with the recipe's text template, where it has one."""

    config: EmbedConfig
    encoder: ResolvedEncoder
    chunk_size: int  # tokens of text a chunk; 0: texts are not chunked

    def job(self) -> Job:
        """The job, without its input and output."""
        return Job(
            label=f"{self.encoder.spec.name} ({self.encoder.spec.dim} dims)",
            settings=settings(self.config, self.encoder),
            mapper=lambda run, workers: _calibrated(self.mapper(run, workers), run, workers),
            model=self.encoder.spec.name,
            shard_slice=parse_slice(self.config.run.slice),
        )

    def planner(self) -> CorpusPlanner:
        """The shards of the corpus, sized for the output."""
        config = self.config
        workers = WorkerRequest(config.workers, self.encoder.spec.weight_bytes)
        return CorpusPlanner(config.corpus, config.run.storage.fsspec, self.shard_rows, workers, config.run.strict)

    def mapper(self, run: Run, workers: WorkerPlan) -> EmbedMapper:
        """The mapper of an opened run."""
        config, corpus = self.config, self.config.corpus
        parts = tuple(parse_template(corpus.text_template)) if corpus.text_template else (("", corpus.text_column),)
        storage, strict = config.run.storage.fsspec, config.run.strict
        rows = TextRows(parts, run.id_column, corpus.keep_columns, run.columns, storage, strict)
        return EmbedMapper(rows, config, self.encoder, self.chunk_size, workers.threads, workers.device)

    def shard_rows(self, corpus: Corpus, workers: int) -> int:
        """Rows a shard, so that a part is about PART_BYTES."""
        config, spec = self.config, self.encoder.spec
        tokens = corpus.row_bytes / CHARACTERS_A_TOKEN
        rows_a_text = max(1.0, tokens / config.chunk_tokens) if config.chunk_tokens else 1.0
        bytes_a_row = row_bytes(spec.dim, config.output_dtype)
        if MULTI in config.outputs:
            bytes_a_row += int(min(spec.max_tokens, tokens) * row_bytes(spec.hidden_size, "float16"))
        return even_rows(corpus, workers, most=int(PART_BYTES / bytes_a_row / rows_a_text))


def resolve(config: EmbedConfig) -> ResolvedEmbedding:
    """Check the config and read the model's files. Raises UsageError or ModelError."""
    check(config)
    encoder = resolve_encoder(config.model)
    if set(config.outputs) != {DENSE}:
        check_bge_m3(Path(encoder.spec.folder))
    template = config.corpus.text_template or encoder.text_template
    config = replace(config, corpus=replace(config.corpus, text_template=template))
    return ResolvedEmbedding(config, encoder, chunk_room(config, encoder))


def as_stage(config: EmbedConfig, folder: Folder, name: str) -> EmbedConfig:
    """The config of an embedding that is a stage of another job: its output in `folder` is named after all that fixes the vectors."""
    output = stage_folder(folder, name, resolve(config).job().settings)
    return replace(config, run=replace(config.run, output=output.url))


def _calibrated(mapper: EmbedMapper, run: Run, workers: WorkerPlan) -> EmbedMapper:
    """The mapper with the int8 ranges of the run: made once from a sample spread over the shards, used by all of them."""
    if mapper.config.output_dtype != "int8":
        return mapper
    if not run.folder.exists(RANGES_FILE):
        log.info("calibrating int8 ranges")
        shards = sample_shards(run.plan, RANGE_SHARDS, RANGE_ROWS)
        uncalibrated = replace(mapper, config=replace(mapper.config, output_dtype="float32"))
        sample = executor.sample(uncalibrated, shards, workers)
        vectors = np.concatenate([as_matrix(tables["vectors"]["vector"]) for tables in sample] or [np.empty((0, 0))])
        if not len(vectors):
            raise InputError("no text in the sample that int8 ranges are calibrated on. Use --output-dtype float16")
        run.folder.claim(RANGES_FILE, json.dumps([vectors.min(axis=0).tolist(), vectors.max(axis=0).tolist()]).encode())
    low, high = json.loads(run.folder.read(RANGES_FILE))
    return replace(mapper, ranges=(tuple(low), tuple(high)))
