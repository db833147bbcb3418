"""Losses, one file each: a frozen dataclass of hyperparameters, and a call that gives a rank's value.

The mean over the ranks of these values is the loss of the global batch. What was gathered hands the sum of its gradients
back to the rank that owns it, and the gradients of the weights are averaged over the ranks: together that is the gradient
of one big batch, at any world size. A loss over rows therefore returns `batch.rows.mean(values)`, and one over the whole batch
its value, the same on every rank.

`LOSS` of a file is the class; `parse` makes one from `infonce:temperature=0.02,weight=0.5`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ...errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


EMBEDDING, RERANKING, TEXT = (
    "embedding",
    "reranking",
    "text",
)  # what a loss is of: vectors, scores of pairs, a text alone


@dataclass(frozen=True)
class BatchKeys:
    """What the plan says of a global batch, known to every rank; G rows of g passages each, the positive first.

    query_keys: int64 [G], passage_keys: int64 [G, g], equal for equal texts. positive_keys: int64 [G, p], of all texts
    known to answer the query. teacher: float32 [G, g], scores that came with the data, or None. in_batch: whether the
    passages of other rows are negatives. first, count: the rows of this rank. world: ranks. slice_rows: rows of a slice,
    which no rank divides; 0 for all of them.
    """

    query_keys: "Tensor"
    passage_keys: "Tensor"
    positive_keys: "Tensor"
    teacher: "Tensor | None"
    in_batch: bool
    first: int
    count: int
    world: int
    slice_rows: int = 0

    @property
    def here(self) -> slice:
        return slice(self.first, self.first + self.count)

    def mean(self, values: "Tensor") -> "Tensor":
        """Local values [count] as this rank's share of their mean over the global batch."""
        return values.sum() * (self.world / len(self.query_keys))

    def taught(self) -> "Tensor":
        """The teacher's scores of all rows, [G, g]. Raises InputError if the data came without."""
        if self.teacher is None:
            raise InputError(
                "this loss learns from scores, and the dataset has none: give it pos_scores and neg_scores"
            )
        return self.teacher


@dataclass(frozen=True)
class TokenTexts:
    """What single tokens of n texts give, text after text, t tokens in all.

    ids: int64 [t]. offsets: int64 [n + 1], where each text begins. weights: [t], lexical, at least 0. vectors: [t, w], one
    a token, the first of a text among them, not normalised.
    """

    ids: "Tensor"
    offsets: "Tensor"
    weights: "Tensor"
    vectors: "Tensor"

    def owners(self) -> "Tensor":
        """The number of each token's text, int64 [t]."""
        import torch

        lengths = self.offsets.diff()
        numbers = torch.arange(len(lengths), device=self.offsets.device)
        return numbers.repeat_interleave(lengths, output_size=len(self.ids))


@dataclass(frozen=True)
class TokenOutputs:
    """Of a rank's rows: b queries, b * g passages row by row, and the ids of tokens that are no words."""

    queries: TokenTexts
    passages: TokenTexts
    special: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """A rank's rows with the vectors that the model gives them.

    queries: [b, d], passages: [b, g, d], as they are pooled, not normalised. gather: local rows -> the rows of all ranks in
    their order, with the gradients summed back. sharpness: learned logarithm that is added to that of every scale, [].
    dim: leading dimensions that count, or None for all. tokens: what single tokens give, for losses that want it.
    """

    rows: BatchKeys
    queries: "Tensor"
    passages: "Tensor"
    gather: "Callable[[Tensor], Tensor]"
    sharpness: "Tensor | None" = None
    dim: int | None = None
    tokens: "TokenOutputs | None" = None
    _gathered: "dict[str, Tensor]" = field(default_factory=dict, repr=False)

    def cut(self, dim: int) -> "Batch":
        """The same batch with vectors of `dim` dimensions. What is gathered already is shared."""
        return replace(self, dim=dim)

    def unit(self, vectors: "Tensor") -> "Tensor":
        """Vectors [..., d] cut to the dimensions that count and L2-normalised, in float32 or better."""
        import torch

        from .tiled_logsumexp import normalised

        kept = vectors[..., : self.dim]
        kept = kept.to(torch.promote_types(kept.dtype, torch.float32))
        return normalised(kept)

    def unit_queries(self) -> "Tensor":
        """[b, d]"""
        return self.unit(self.queries)

    def unit_passages(self) -> "Tensor":
        """[b, g, d]"""
        return self.unit(self.passages)

    def all_unit_queries(self) -> "Tensor":
        """[G, d]"""
        return self.unit(self._all("queries"))

    def all_unit_passages(self) -> "Tensor":
        """[G, g, d]"""
        return self.unit(self._all("passages"))

    def scale(self, temperature: float) -> "Tensor":
        """1 / temperature, sharpened by what is learned: []."""
        import torch

        dtype = torch.promote_types(self.queries.dtype, torch.float32)
        base = self.queries.new_tensor(1.0 / temperature, dtype=dtype)
        return base if self.sharpness is None else base * self.sharpness.exp()

    def _all(self, name: str) -> "Tensor":
        """One gather a tensor and step, however often and at whatever dimension it is asked for."""
        if name not in self._gathered:
            self._gathered[name] = self.gather(getattr(self, name))
        return self._gathered[name]


@dataclass(frozen=True)
class Scores:
    """A rank's rows with a reranker's raw scores of their pairs: [b, g], the positive first."""

    rows: BatchKeys
    scores: "Tensor"

    def precise(self) -> "Tensor":
        """The scores in float32 or better, [b, g]."""
        import torch

        return self.scores.to(torch.promote_types(self.scores.dtype, torch.float32))


class Loss(Protocol):
    """of: EMBEDDING, called with a Batch; RERANKING, called with Scores. Returns a scalar."""

    of: ClassVar[str]

    def __call__(self, batch: Any) -> "Tensor": ...


@dataclass(frozen=True)
class Sum:
    """Several losses of one batch, added up."""

    losses: tuple[Any, ...]

    @property
    def of(self) -> str:
        return self.losses[0].of

    def __call__(self, batch: Any) -> "Tensor":
        total = self.losses[0](batch)
        for loss in self.losses[1:]:
            total = total + loss(batch)
        return total


def names() -> list[str]:
    """Of all losses that stand alone."""
    found = {module.name for module in pkgutil.iter_modules(__path__)} - {"tiled_logsumexp", "matryoshka"}
    return sorted(name.replace("_", "-") for name in found)


def parse(texts: tuple[str, ...]) -> Any:
    """The loss of `name:key=value,...`, or the sum of several. Raises UsageError with the choices for what does not exist."""
    losses = tuple(_parse_one(text) for text in texts)
    kinds = sorted({loss.of for loss in losses})
    if len(kinds) > 1:
        raise UsageError(f"--loss {' and '.join(texts)} are of {' and '.join(kinds)}: losses of one kind can be added")
    return losses[0] if len(losses) == 1 else Sum(losses)


def _parse_one(text: str) -> Any:
    name, _, rest = text.partition(":")
    if name.replace("_", "-") not in names():
        raise UsageError(f"no loss {name!r}. Losses: {', '.join(names())}")
    kind = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").LOSS
    known = {each.name: each for each in fields(kind)}
    given: dict[str, Any] = {}
    for word in filter(None, rest.split(",")):
        key, _, value = word.partition("=")
        if key not in known:
            raise UsageError(f"--loss {text!r}: {name} has no {key!r}. It has {', '.join(known) or 'no parameter'}")
        given[key] = _value(known[key], value, text)
    if given.get("temperature", 1.0) <= 0 or given.get("teacher_temperature", 1.0) <= 0:
        raise UsageError(f"--loss {text!r}: a temperature is over 0")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--loss {text!r}: {error}") from error


def _value(parameter: Any, value: str, text: str) -> Any:
    """By the type of the parameter's default: float, int, str, or a tuple of floats written with +."""
    kind = type(parameter.default) if parameter.default not in (None, MISSING) else float
    try:
        return tuple(float(part) for part in value.split("+")) if kind is tuple else kind(value)
    except ValueError as error:
        raise UsageError(f"--loss {text!r}: {parameter.name}={value!r} is not {kind.__name__}") from error


def described(loss: Any) -> Mapping[str, Any]:
    """A loss as plain values, for records and cards."""
    if isinstance(loss, Sum):
        return {"sum": [described(each) for each in loss.losses]}
    name = type(loss).__module__.rsplit(".", 1)[-1].replace("_", "-")
    values = {each.name: getattr(loss, each.name) for each in fields(loss)}
    return {"loss": name} | {key: described(value) if is_dataclass(value) else value for key, value in values.items()}
