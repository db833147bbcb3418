"""Losses, one file each: a frozen dataclass of hyperparameters whose call returns the loss of a rank's rows.

The mean of the ranks' values is the loss of the global batch. DDP averages weight gradients over the ranks, and `gather` sums the
gradients of gathered tensors on the rank that owns them: together they are the gradient of one large batch, at any world size.
So a loss over rows returns `batch.keys.global_mean(values)`; a loss over the whole batch returns the same value on every rank.

A loss file exports its class as `LOSS`, a dataclass with a `kind`, whose call returns a scalar; `parse` makes one from text
such as `infonce:temperature=0.02,weight=0.5`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor as Tensor
else:
    Tensor = Any  # losses are parsed and described without torch


# The kinds of losses, by what they are computed from: vectors (a Batch), scores of pairs, or losses of single texts (Scores).
EMBEDDING, RERANKING, TEXT = "embedding", "reranking", "text"


@dataclass(frozen=True)
class BatchKeys:
    """Text keys and teacher scores of a global batch of G rows, known to every rank. A row has g passages, the positive first.

    query_keys: int64 [G], passage_keys: int64 [G, g]; equal texts have equal keys. positive_keys: int64 [G, p], all texts
    known to answer the query. teacher: float32 [G, g], scores that come with the dataset, or None. in_batch: whether passages
    of other rows are negatives. first, count: this rank's rows. world: number of ranks. virtual_rank_rows: rows of a virtual
    rank (see step.collectives); 0 for one virtual rank.
    """

    query_keys: Tensor
    passage_keys: Tensor
    positive_keys: Tensor
    teacher: Tensor | None
    in_batch: bool
    first: int
    count: int
    world: int
    virtual_rank_rows: int = 0

    @property
    def local(self) -> slice:
        """This rank's rows of the global batch."""
        return slice(self.first, self.first + self.count)

    def global_mean(self, values: Tensor) -> Tensor:
        """This rank's share of the mean over the global batch. values: of the local rows, [count]."""
        return values.sum() * (self.world / len(self.query_keys))

    def teacher_scores(self) -> Tensor:
        """Teacher scores of all rows, [G, g]. Raises InputError for a dataset without scores."""
        if self.teacher is None:
            raise InputError(
                "this loss learns from scores, and the dataset has none: give it pos_scores and neg_scores"
            )
        return self.teacher


@dataclass(frozen=True)
class TokenTexts:
    """Outputs of single tokens of n texts, concatenated, t tokens in all.

    ids: int64 [t]. offsets: int64 [n + 1], the start of each text. weights: [t], lexical, at least 0. vectors: [t, w], one a
    token including the first of a text, not normalised.
    """

    ids: Tensor
    offsets: Tensor
    weights: Tensor
    vectors: Tensor

    def text_numbers(self) -> Tensor:
        """The number of each token's text, int64 [t]."""
        import torch

        lengths = self.offsets.diff()
        numbers = torch.arange(len(lengths), device=self.offsets.device)
        return numbers.repeat_interleave(lengths, output_size=len(self.ids))


@dataclass(frozen=True)
class TokenOutputs:
    """Token outputs of a rank's b queries and b * g passages, row by row. special: token ids that are no words."""

    queries: TokenTexts
    passages: TokenTexts
    special: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """A rank's rows with their embeddings.

    queries: [b, d], passages: [b, g, d], pooled, not normalised. gather: local rows -> rows of all ranks, in order; gradients
    are summed back. logit_scale: learned logarithm of a factor of every scale, []. dim: leading dimensions in use, None for
    all; a copy of another dim shares what was gathered. tokens: token outputs, for losses that use them.
    """

    keys: BatchKeys
    queries: Tensor
    passages: Tensor
    gather: Callable[[Tensor], Tensor]
    logit_scale: Tensor | None = None
    dim: int | None = None
    tokens: TokenOutputs | None = None
    _gathered: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def unit(self, vectors: Tensor) -> Tensor:
        """Truncate vectors [..., d] to `dim` and L2-normalise them, in float32 or better."""
        from .tiled_logsumexp import l2_normalise

        return l2_normalise(at_least_float32(vectors[..., : self.dim]))

    def positive_cosines(self) -> Tensor:
        """Cosines of the local queries and their positives, [b]."""
        return (self.unit_queries() * self.unit(self.passages[:, 0])).sum(-1)

    def own_cosines(self) -> Tensor:
        """Cosines of the local queries and their own passages, [b, g]."""
        return (self.unit_passages() @ self.unit_queries().unsqueeze(-1)).squeeze(-1)

    def unit_queries(self) -> Tensor:
        """[b, d]"""
        return self.unit(self.queries)

    def unit_passages(self) -> Tensor:
        """[b, g, d]"""
        return self.unit(self.passages)

    def all_unit_queries(self) -> Tensor:
        """[G, d]"""
        return self.unit(self._gather_once("queries"))

    def all_unit_passages(self) -> Tensor:
        """[G, g, d]"""
        return self.unit(self._gather_once("passages"))

    def scale(self, temperature: float) -> Tensor:
        """The factor of all cosines, []: exp(logit_scale) / temperature."""
        import torch

        dtype = torch.promote_types(self.queries.dtype, torch.float32)
        base = self.queries.new_tensor(1.0 / temperature, dtype=dtype)
        return base if self.logit_scale is None else base * self.logit_scale.exp()

    def _gather_once(self, name: str) -> Tensor:
        """Gather a tensor on its first use in a step; later uses, at any dimension, share the result."""
        if name not in self._gathered:
            self._gathered[name] = self.gather(getattr(self, name))
        return self._gathered[name]


@dataclass(frozen=True)
class Scores:
    """A rank's rows with a reranker's raw scores of their pairs, [b, g], the positive first."""

    keys: BatchKeys
    scores: Tensor

    def float32_scores(self) -> Tensor:
        """The scores in float32 or better, [b, g]."""
        return at_least_float32(self.scores)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 as they are."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class Sum:
    """The sum of several losses of one batch."""

    losses: tuple[Any, ...]

    @property
    def kind(self) -> str:
        return self.losses[0].kind

    def __call__(self, batch: Any) -> Tensor:
        values = [loss(batch) for loss in self.losses]
        return sum(values[1:], values[0])


def names() -> list[str]:
    """Names of the losses that `parse` takes."""
    modules = {module.name for module in pkgutil.iter_modules(__path__)} - {"tiled_logsumexp", "matryoshka"}
    return sorted(name.replace("_", "-") for name in modules)


def parse(texts: tuple[str, ...]) -> Any:
    """Make a loss from `name:key=value,...`, or the sum of several.

    Raises UsageError, with the choices, for a name or parameter that does not exist.
    """
    losses = tuple(_parse_one(text) for text in texts)
    kinds = sorted({loss.kind for loss in losses})
    if len(kinds) > 1:
        raise UsageError(f"--loss {' and '.join(texts)} are of {' and '.join(kinds)}: losses of one kind can be added")
    return losses[0] if len(losses) == 1 else Sum(losses)


def _parse_one(text: str) -> Any:
    name, _, rest = text.partition(":")
    if name.replace("_", "-") not in names():
        raise UsageError(f"no loss {name!r}. Losses: {', '.join(names())}")
    loss_class = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").LOSS
    parameters = {each.name: each for each in fields(loss_class)}
    values: dict[str, Any] = {}
    for assignment in filter(None, rest.split(",")):
        key, _, value = assignment.partition("=")
        if key not in parameters:
            choices = ", ".join(parameters) or "no parameter"
            raise UsageError(f"--loss {text!r}: {name} has no {key!r}. It has {choices}")
        values[key] = _parse_value(parameters[key], value, text)
    if values.get("temperature", 1.0) <= 0 or values.get("teacher_temperature", 1.0) <= 0:
        raise UsageError(f"--loss {text!r}: a temperature is over 0")
    try:
        return loss_class(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--loss {text!r}: {error}") from error


def _parse_value(parameter: Any, value: str, text: str) -> Any:
    """Convert to the type of the parameter's default: float, int, str, or a tuple of floats joined by +."""
    kind = type(parameter.default) if parameter.default not in (None, MISSING) else float
    try:
        return tuple(float(part) for part in value.split("+")) if kind is tuple else kind(value)
    except ValueError as error:
        raise UsageError(f"--loss {text!r}: {parameter.name}={value!r} is not {kind.__name__}") from error


def describe(loss: Any) -> Mapping[str, Any]:
    """A loss as plain values, for records and model cards."""
    if isinstance(loss, Sum):
        return {"sum": [describe(each) for each in loss.losses]}
    name = type(loss).__module__.rsplit(".", 1)[-1].replace("_", "-")
    values = {each.name: getattr(loss, each.name) for each in fields(loss)}
    return {"loss": name} | {key: describe(value) if is_dataclass(value) else value for key, value in values.items()}
