"""Options of the embed job, and a refusal of those that cannot go together."""

from dataclasses import dataclass
from typing import Any

from ..cli.options import group, option
from ..data.corpus import CorpusOptions
from ..data.texts import parse_template
from ..data.vectors import OutputDtype
from ..engine.job import RunOptions, refuse_nested
from ..engine.workers import WorkerOptions
from ..errors import UsageError
from ..models.encoder_options import ModelOptions, ResolvedEncoder
from ..models.tokenizer import Tokenizer
from ..storage.filesystem import filesystem

OUTPUTS = DENSE, SPARSE, MULTI = "dense", "sparse", "multi_vector"
RESERVED = {"id", "chunk", "start", "end", "embedding", "sparse", "multi_vector", "tokens", "truncated", "error"}
MIN_CHUNK_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Options of `jobs/embed_corpus.py`."""

    corpus: CorpusOptions
    run: RunOptions
    model: ModelOptions = group(ModelOptions)
    workers: WorkerOptions = group(WorkerOptions)
    chunk_tokens: int | None = option(
        "Cut texts into chunks of N tokens, a row each, instead of truncating.", None, min=MIN_CHUNK_TOKENS
    )
    chunk_overlap: int = option("Tokens a chunk shares with the one before.", 0, min=0)
    outputs: tuple[str, ...] = option("dense, and of M3 checkpoints sparse and multi_vector, by commas.", (DENSE,))
    output_dtype: OutputDtype = option("Type of the stored vectors. int8 ranges are calibrated once a run.", "float32")


def check(config: EmbedConfig) -> None:
    """Raises UsageError for options that cannot go together."""
    if reserved := RESERVED & set(config.corpus.keep_columns):
        raise UsageError(f"--keep-columns {reserved.pop()}: the output has a column of that name of its own. Rename it")
    if unknown := set(config.outputs) - set(OUTPUTS):
        raise UsageError(f"--outputs {unknown.pop()}: choose from {', '.join(OUTPUTS)}")
    if DENSE not in config.outputs:
        raise UsageError(f"--outputs {','.join(config.outputs)}: dense is always made; name it too")
    refuse_nested(config.corpus.input, config.run.output, config.run.storage.fsspec)
    if config.chunk_tokens and config.chunk_overlap >= config.chunk_tokens:
        raise UsageError(
            f"--chunk-overlap {config.chunk_overlap} must be less than --chunk-tokens {config.chunk_tokens}"
        )
    if config.corpus.text_template is not None:
        parse_template(config.corpus.text_template)


def chunk_room(config: EmbedConfig, encoder: ResolvedEncoder) -> int:
    """Tokens of text a chunk, beside prompt and special tokens; 0 without --chunk-tokens.

    Raises UsageError where a prompt leaves no token for the text, or too few for a chunk; ModelError where the tokenizer
    has no offsets.
    """
    if not config.chunk_tokens and not encoder.prompt:
        return 0
    tokenizer = Tokenizer(encoder.spec)
    prompt = tokenizer.tokens_of_prompt(encoder.prompt)
    if not config.chunk_tokens:
        return 0
    tokenizer.spans(encoder.prompt)  # raises where the tokenizer has no offsets
    room = min(config.chunk_tokens, tokenizer.limit - prompt)
    if room < MIN_CHUNK_TOKENS or config.chunk_overlap >= room:
        raise UsageError(
            f"--chunk-tokens {config.chunk_tokens} with --chunk-overlap {config.chunk_overlap}: the model takes "
            f"{encoder.spec.max_tokens} tokens, prompt and special ones leave {room} for a chunk. It must be "
            f"{MIN_CHUNK_TOKENS} at least, and more than the overlap"
        )
    return room


def settings(config: EmbedConfig, encoder: ResolvedEncoder) -> dict[str, Any]:
    """Everything that fixes the rows and their vectors. A run with other settings is another run."""
    corpus = config.corpus
    fs, path = filesystem(corpus.input, config.run.storage.fsspec)
    model = {f"model {k}": v for k, v in vars(encoder.spec).items() if k not in ("name", "path", "revision")}
    return model | {
        "job": "embed",
        "input": fs.unstrip_protocol(path),
        "text": corpus.text_template or f"{{{corpus.text_column}}}",
        "id_column": corpus.id_column,
        "keep_columns": list(corpus.keep_columns),
        "limit": corpus.limit,
        "prompt": encoder.prompt,
        "dtype": config.model.dtype,
        "output_dtype": config.output_dtype,
        "outputs": list(config.outputs),
        "chunk_tokens": config.chunk_tokens,
        "chunk_overlap": config.chunk_overlap,
        "shard_rows": corpus.shard_rows,
        "revision": encoder.spec.revision,
    }
