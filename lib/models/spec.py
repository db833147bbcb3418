"""ModelSpec and Tokens: everything that decides a model's vectors, and texts as token ids.

spec_reader.read_spec     files -> ModelSpec     (driver: seconds, before a cluster starts)
tokenizer.Tokenizer       texts -> Tokens        (CPU stage)
encoder.Encoder           Tokens -> vectors      (CPU or GPU worker)
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ..errors import ModelError
from . import files


class Tokens(NamedTuple):
    """Token ids of many texts laid end to end.

    ids: int32 [tokens], special tokens included. offsets: int64 [n + 1], text i is ids[offsets[i]:offsets[i + 1]].
    truncated: bool [n], whether the text had more tokens than the model takes.
    """

    ids: np.ndarray
    offsets: np.ndarray
    truncated: np.ndarray

    def columns(self) -> dict[str, pa.Array]:
        """Columns of an Arrow table with a row a text."""
        return {"ids": pa.LargeListArray.from_arrays(self.offsets, self.ids), "truncated": pa.array(self.truncated)}

    @classmethod
    def of_table(cls, table: pa.Table) -> "Tokens":
        """Read a table with these columns, as views of its buffers."""
        ids = table["ids"].combine_chunks()
        offsets = ids.offsets.to_numpy()
        flat = ids.values.to_numpy()[offsets[0] : offsets[-1]]
        return cls(flat, offsets - offsets[0], table["truncated"].combine_chunks().to_numpy(zero_copy_only=False))


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides the vectors of a model directory, as plain values that pickle and convert to JSON."""

    name: str  # as the command gives it: a path, a URL or a hub id
    path: str  # local directory with the files
    revision: str  # hub commit, or "weights-" and 12 hex digits of a fingerprint of the files
    subfolder: str  # of `path`, with config, weights and tokenizer; "" for the directory itself
    architecture: str
    model_type: str
    hidden_size: int
    state_size: int  # numbers of a token's state that are pooled; differs from hidden_size after a last projection
    vocabulary: int  # rows of the embedding table; 0 where config.json does not say
    dim: int  # of the output vectors
    max_tokens: int  # special tokens included
    pooling: tuple[str, ...]  # several modes are concatenated
    include_prompt: bool  # whether a prompt's tokens are pooled
    dense: tuple[str, ...]  # subfolders of the layers after the pooling, in their order
    normalize: bool
    truncate_dim: int | None
    prompts: dict[str, str] = field(hash=False)
    default_prompt_name: str | None
    bidirectional: bool  # a decoder that must run with is_causal=False
    append_eos: bool  # an end-of-sequence token ends every text
    lower_case: bool
    padding_side: str
    weight_bytes: int  # on disk
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    gated: bool  # a feed-forward layer of three matrices rather than two

    @property
    def folder(self) -> str:
        """The directory of config, weights and tokenizer."""
        return str(Path(self.path) / self.subfolder)


def on_this_machine(spec: ModelSpec) -> ModelSpec:
    """Return the spec with the path of the files on this node: a worker downloads a model that the driver has from a hub.

    Raises ModelError for a directory that only the driver's machine has.
    """
    if Path(spec.path).is_dir():
        return spec
    if "://" in spec.name:
        return replace(spec, path=str(files.locate(spec.name)))
    if Path(spec.name).expanduser().is_absolute() or spec.revision.startswith("weights-"):
        raise ModelError(
            f"The model directory {spec.path} is on the driver's machine and not on this node. Put it at the same path on "
            "every node (a shared file system, or the image), or give a hub id."
        )
    return replace(spec, path=str(files.locate(spec.name, spec.revision)))


def flops_per_token(spec: ModelSpec, length: int) -> float:
    """Return the FLOP of a token in a text of `length` tokens: two for each multiply-add of matrices and attention."""
    attention = 2 * (spec.heads + spec.kv_heads) * spec.head_dim * spec.hidden_size
    feed_forward = (3 if spec.gated else 2) * spec.hidden_size * spec.intermediate_size
    attended = length / 2 if spec.architecture.endswith("ForCausalLM") and not spec.bidirectional else length
    return 2.0 * spec.layers * (attention + feed_forward + 2 * attended * spec.heads * spec.head_dim)
