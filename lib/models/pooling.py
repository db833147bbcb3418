"""Pooling of token states into vectors, and the dense layers, truncation and normalisation after it, in float32.

Sums run over each document's tokens in order (torch.segment_reduce, no atomics), so results are the same on every run.
The definitions are those of sentence-transformers. `skip` leaves out a prompt's tokens at the start of every document.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ModelError
from .files import read_json
from .load import read_weights
from .spec import ModelSpec


def pool(hidden: Tensor, offsets: Tensor, modes: tuple[str, ...], skip: int = 0) -> Tensor:
    """Pool token states [tokens, hidden] of any float dtype into float32 [documents, len(modes) * hidden].

    offsets: int64 [documents + 1] on the same device; no document may be empty. The outputs of several modes are concatenated.
    """
    return torch.cat([_POOLS[mode](hidden, offsets, skip) for mode in modes], dim=1)


def _promoted(states: Tensor) -> Tensor:
    """Cast to float32; float64 stays as it is."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _cls(hidden: Tensor, offsets: Tensor, skip: int) -> Tensor:
    """Take the first token that is not skipped, or the first of all when every token is."""
    lengths = offsets.diff()
    return _promoted(hidden[offsets[:-1] + torch.where(lengths > skip, skip, 0)])


def _last(hidden: Tensor, offsets: Tensor, skip: int) -> Tensor:
    """Take the last token; zeros when every token is skipped."""
    return _promoted(hidden[offsets[1:] - 1]) * (offsets.diff() > skip).unsqueeze(1)


def _mean(hidden: Tensor, offsets: Tensor, skip: int) -> Tensor:
    """Average the tokens that are not skipped."""
    return _sum(hidden, offsets, skip) / _pooled_tokens(offsets, skip)


def _mean_sqrt(hidden: Tensor, offsets: Tensor, skip: int) -> Tensor:
    """Sum the tokens that are not skipped and divide by the root of their number."""
    return _sum(hidden, offsets, skip) / _pooled_tokens(offsets, skip).sqrt()


def _max(hidden: Tensor, offsets: Tensor, skip: int) -> Tensor:
    """Take the largest value of each dimension over the tokens that are not skipped."""
    states = _promoted(hidden)
    if skip:
        states = states.masked_fill(_positions(hidden, offsets).unsqueeze(1) < skip, float("-inf"))
    return torch.segment_reduce(states, "max", offsets=offsets, unsafe=True)


def _weighted_mean(hidden: Tensor, offsets: Tensor, skip: int) -> Tensor:
    """Weight token i by i + 1, with i counted from the document's start even where a prompt is skipped."""
    positions = _positions(hidden, offsets)
    weights = ((positions + 1) * (positions >= skip)).to(_promoted(hidden[:0]).dtype).unsqueeze(1)
    total = torch.segment_reduce(weights, "sum", offsets=offsets, unsafe=True)
    pooled = torch.segment_reduce(_promoted(hidden) * weights, "sum", offsets=offsets, unsafe=True)
    return pooled / total.clamp(min=1e-9)


def _sum(hidden: Tensor, offsets: Tensor, skip: int) -> Tensor:
    """Sum the tokens that are not skipped."""
    states = _promoted(hidden)
    if skip:
        states = states * (_positions(hidden, offsets) >= skip).unsqueeze(1)
    return torch.segment_reduce(states, "sum", offsets=offsets, unsafe=True)


def _pooled_tokens(offsets: Tensor, skip: int) -> Tensor:
    """Count the tokens that are not skipped, float32 [documents, 1]; 1e-9 for none, as a divisor."""
    return (offsets.diff() - skip).clamp(min=0).float().clamp(min=1e-9).unsqueeze(1)


def _positions(hidden: Tensor, offsets: Tensor) -> Tensor:
    """Return the position of each token in its document, int64 [tokens]."""
    tokens = hidden.shape[0]
    starts = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=tokens)
    return torch.arange(tokens, device=hidden.device) - starts


_POOLS = {
    "cls": _cls,
    "lasttoken": _last,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
}


class Head(nn.Module):
    """The layers after the pooling: dense layers, truncation to the spec's `dim`, L2 normalisation, all in float32."""

    def __init__(self, spec: ModelSpec) -> None:
        """Load the dense layers of the spec. Raises ModelError for layers that cannot be loaded."""
        super().__init__()
        self.layers = nn.Sequential(*(_load_layer(Path(spec.path) / folder) for folder in spec.dense))
        self.dim = spec.dim
        self.normalize = spec.normalize

    def forward(self, pooled: Tensor) -> Tensor:
        """Map float32 [documents, pooled width] to float32 [documents, dim]."""
        vectors = self.layers(pooled)[:, : self.dim]
        return functional.normalize(vectors, dim=1) if self.normalize else vectors


class Dense(nn.Module):
    """A linear layer with its activation and, where the configuration sets it, a residual connection."""

    def __init__(self, config: dict, folder: Path) -> None:
        super().__init__()
        wide, narrow = config["in_features"], config["out_features"]
        self.linear = nn.Linear(wide, narrow, bias=config.get("bias", True))
        self.activation = _activation(config.get("activation_function", "torch.nn.Tanh"), folder)
        self.use_residual = config.get("use_residual", False)
        if self.use_residual and wide != narrow:
            self.residual = nn.Linear(wide, narrow, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        output = self.activation(self.linear(vectors))
        if not self.use_residual:
            return output
        return output + (self.residual(vectors) if hasattr(self, "residual") else vectors)


def _load_layer(folder: Path) -> nn.Module:
    """Load a Dense or LayerNorm module from its folder. Raises ModelError for weights that do not fit."""
    config = read_json(folder / "config.json")
    is_norm = "dimension" in config
    layer = nn.Sequential(OrderedDict(norm=nn.LayerNorm(config["dimension"]))) if is_norm else Dense(config, folder)
    try:
        layer.load_state_dict(read_weights(folder))
    except (RuntimeError, OSError) as error:
        raise ModelError(
            f"The weights in {folder} do not fit its config.json. Fetch the model again. ({error})"
        ) from error
    return layer.float()


def _activation(name: str, folder: Path) -> nn.Module:
    """Return the activation that a configuration names. Only classes of torch.nn are allowed: no other import is made."""
    activation = getattr(nn, name.rsplit(".", 1)[-1], None) if name.startswith("torch.nn.") else None
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        raise ModelError(
            f"{folder}/config.json: activation_function {name!r} is not a class of torch.nn; use one that is."
        )
    return activation()
