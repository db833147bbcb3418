"""BGE-M3's sparse and multi-vector outputs: two linear layers on the token states.

Source: Chen et al. 2024 (arXiv 2402.03216) and FlagEmbedding, which saves the layers beside the checkpoint. The weight of
a token is relu(w.h + b). The weight of a vocabulary entry is the maximum over its tokens in the text; special tokens have
none. The multi-vector output is the L2-normalised vectors of all tokens of a text but the first.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional

from .files import BGE_M3_FILES, check_bge_m3
from .spec import ModelSpec, Tokens


class BgeM3Head(nn.Module):
    """The sparse and the multi-vector layer, in float32."""

    def __init__(self, spec: ModelSpec) -> None:
        """Load the layers of the spec's directory. Raises ModelError for a checkpoint without the two files."""
        super().__init__()
        folder = Path(spec.folder)
        check_bge_m3(folder)
        self.lexical, self.multiple = (_layer(folder / name, spec.hidden_size) for name in BGE_M3_FILES)
        self.width = self.multiple.out_features

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States [tokens, hidden] -> weights float32 [tokens], vectors float16 [tokens, width]."""
        states = states.float()
        weights = functional.relu(self.lexical(states)).squeeze(1)
        return weights, functional.normalize(self.multiple(states), dim=1).half()


def _layer(file: Path, width: int) -> nn.Linear:
    """Load a linear layer from the state dict in `file`."""
    weights = torch.load(file, map_location="cpu", weights_only=True)
    layer = nn.Linear(width, weights["weight"].shape[0])
    layer.load_state_dict(weights)
    return layer.float()


def sparse_column(tokens: Tokens, weights: np.ndarray, special: Iterable[int]) -> pa.StructArray:
    """Build struct<indices: list<int32>, values: list<float32>>, one a text: token ids ascending, weights above zero."""
    lengths = np.diff(tokens.offsets)
    document = np.repeat(np.arange(len(lengths)), lengths)
    weighted = (weights > 0) & ~np.isin(tokens.ids, list(special))
    document, ids, values = document[weighted], tokens.ids[weighted], weights[weighted]
    order = np.lexsort((ids, document))
    document, ids, values = document[order], ids[order], values[order]
    first = np.flatnonzero(np.diff(document, prepend=-1) | np.diff(ids, prepend=-1))
    greatest = np.maximum.reduceat(values, first) if len(first) else values
    ends = np.searchsorted(document[first], np.arange(len(lengths) + 1)).astype(np.int32)
    lists = [pa.ListArray.from_arrays(ends, pa.array(each)) for each in (ids[first].astype(np.int32), greatest)]
    return pa.StructArray.from_arrays(lists, names=["indices", "values"])


def multi_vector_column(tokens: Tokens, vectors: np.ndarray) -> pa.ListArray:
    """Build list<fixed_size_list<float16>[width]>, one a text, without the vector of its first token."""
    lengths = np.diff(tokens.offsets)
    first = np.zeros(len(tokens.ids), dtype=bool)
    first[tokens.offsets[:-1][lengths > 0]] = True
    rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors[~first].reshape(-1)), vectors.shape[1])
    ends = np.concatenate([[0], np.cumsum(np.maximum(lengths - 1, 0))]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, rows)
