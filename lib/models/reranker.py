"""Reranker: pairs to scores on one device, without padding; a prefix shared by pairs is computed once where exact."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError
from . import prefix_sharing, self_test
from .attention import CannotPack
from .encoder import OnDevice
from .forward import PackedBatch, check_tokens, move, positions, run_equal_length, run_packed
from .load import load_network, position_start, vocabulary_size
from .packing import offsets_of
from .pair_tokenizer import Pairs
from .reranker_spec import RerankSpec
from .score_heads import Classifier, TokenLogits, load_classifier
from .spec import Tokens
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE_LENGTHS = (31, 12, 12, 7, 5)  # tokens of each pair of the self-test
SHARED_TOKENS = 4  # tokens that the pairs of the self-test share at the start
FLOAT32_TOLERANCE, HALF_TOLERANCE = 1e-3, 3e-2  # times the largest score, or times 1 where it is smaller
Picker = Callable[[Tensor, PackedBatch], Tensor]


def first_token(states: Tensor, batch: PackedBatch) -> Tensor:
    """Pick the first state of each pair."""
    return states[batch.offsets[:-1]]


def mean_of_tokens(states: Tensor, batch: PackedBatch) -> Tensor:
    """Average the states of each pair, in float32."""
    return torch.segment_reduce(states.float(), "mean", offsets=batch.offsets, unsafe=True).to(states.dtype)


@dataclass(frozen=True)
class LastToken:
    """Pick the last state of each pair; of tokens other than `padding`, if given, as transformers' decoders do."""

    padding: int | None = None

    def __call__(self, states: Tensor, batch: PackedBatch) -> Tensor:
        if self.padding is None:
            return states[batch.offsets[1:] - 1]
        places = torch.arange(len(batch.ids), device=batch.ids.device, dtype=torch.float64)  # exact up to 2^53
        counted = places.where(batch.ids != self.padding, -1.0)
        last = torch.segment_reduce(counted, "max", offsets=batch.offsets, unsafe=True).long()
        return states[last.maximum(batch.offsets[:-1])]

    def left_out(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Count the tokens at the end of each pair that do not count: int64 [n]. ids: [tokens]. offsets: int64 [n + 1]."""
        if self.padding is None:
            return np.zeros(len(offsets) - 1, np.int64)
        last = np.maximum.accumulate(np.where(ids != self.padding, np.arange(len(ids)), -1))[offsets[1:] - 1]
        return offsets[1:] - 1 - np.maximum(last, offsets[:-1])


class Reranker(OnDevice):
    """A reranker on a device: pairs in, float32 scores out. It owns the weights and serves one call at a time.

    mode: "shared" where the prefix of a query's pairs is computed once, "packed", or "exact-length" for models whose attention
    cannot be packed exactly. computed: tokens that went through the network, a shared prefix counted once a row. head: scores
    the states of `network` that `pick` picks. padding_id: see forward.positions.
    """

    network: "PreTrainedModel"
    head: torch.nn.Module
    pick: Picker

    def __init__(
        self,
        spec: RerankSpec,
        *,
        dtype: str = "auto",
        device: str | None = None,
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Load and self-test the model, which takes seconds. Raises ModelError where it cannot load, or scores wrongly."""
        super().__init__(spec.model, dtype, device, token_budget, threads)
        self.spec = spec
        self.computed = 0
        with torch.no_grad():  # training cannot use buffers written in inference mode
            load = self._load_language_model if spec.answers else self._load_classifier
            load()

    @torch.inference_mode()
    def score(self, pairs: Pairs, groups: np.ndarray) -> np.ndarray:
        """Score the pairs in their order: float32 [n], after the spec's activation.

        groups: int64 [n], equal for pairs that are likely to share a prefix: those of one query. They change the time, not
        the scores. Raises UsageError for pairs of another model's pair_format.
        """
        check_tokens(pairs.tokens.ids, np.diff(pairs.tokens.offsets), self._vocabulary, self.spec.limit)
        logits = self._logits(pairs, groups)
        return 1 / (1 + np.exp(-logits)) if self.spec.activation == "sigmoid" else logits

    def _load_language_model(self) -> None:
        """Load a language model, whose score is the logits of the answers at the last token."""
        network = load_network(self.spec.model, self.precision, self.device)
        self.head = TokenLogits(network, self.spec.model.folder, *self._answer_ids()).to(self.device)
        pairs, alone = self._sample(network, has_token_types=False)
        expected = [self.head(network(**batch.inputs()).last_hidden_state[:, -1]) for batch in alone]
        self._choose_pick_and_mode(pairs, alone, expected, (LastToken(),))

    def _load_classifier(self) -> None:
        """Load a sequence classifier, whose head scores the state that its network pools."""
        classifier = load_classifier(self.spec.model.folder, self.precision, self.device)
        token_types = int(getattr(classifier.config, "type_vocab_size", 0) or 0)
        pairs, alone = self._sample(getattr(classifier, classifier.base_model_prefix), token_types > 1)
        expected = [classifier(**batch.inputs()).logits.float()[:, 0] for batch in alone]
        padding = classifier.config.pad_token_id
        self.head = Classifier(classifier)
        picks = (first_token, LastToken(), LastToken(padding), mean_of_tokens)
        self._choose_pick_and_mode(pairs, alone, expected, picks)

    def _sample(self, network: Any, has_token_types: bool) -> tuple[Pairs, list[PackedBatch]]:
        """Set the network; return pairs of arbitrary ids that share their first tokens, longest first, and each as a batch."""
        self.network, self._has_token_types = network, has_token_types
        self._vocabulary, self.padding_id = vocabulary_size(network), position_start(network)
        lengths = np.minimum(SAMPLE_LENGTHS, self.spec.model.max_tokens)
        offsets, singles = offsets_of(lengths), np.arange(len(lengths))
        ids = self_test.arbitrary_ids(network, int(offsets[-1]))
        for start, end in pairwise(offsets):
            ids[start : min(start + SHARED_TOKENS, end)] = ids[: min(SHARED_TOKENS, end - start)]
        if (padding := network.config.pad_token_id) is not None:  # a text may have it, and decoders end with it
            inside = offsets[1:][::2] - 1
            ids[np.concatenate([inside, inside - 1, offsets[1:][1::2] - 2])] = padding
        pairs = Pairs(Tokens(ids.astype(np.int32), offsets, np.zeros(len(lengths), dtype=bool)), lengths // 2)
        (row,) = prefix_sharing.rows(offsets, singles, np.zeros_like(singles), int(offsets[-1]), singles, False)
        whole = self._packed_batch(pairs, row)
        return pairs, [whole.part(number, number + 1) for number in range(len(lengths))]

    def _choose_pick_and_mode(
        self, pairs: Pairs, alone: list[PackedBatch], expected_scores: list[Tensor], picks: tuple[Picker, ...]
    ) -> None:
        """Set `pick` and `mode` by measurement; nothing is assumed about the network. Raises ModelError.

        The states of each pair alone decide the pick. The network's states decide whether it can be packed, and whether
        it is causal, so that a prefix does not depend on the tokens after it. The final combination must give the
        expected scores, those of each pair alone with the network as transformers runs it.
        """
        expected = torch.cat(expected_scores).cpu().numpy()
        states = [run_equal_length(self.network, batch) for batch in alone]
        distances = [self._pick_error(states, alone, pick, expected) for pick in picks]
        self.pick = picks[int(np.argmin(distances))]
        causal = self_test.is_causal(self.network, self.device)
        self.mode = self_test.choose_mode(self.network, self.spec.model, self.padding_id, self.device)
        tolerance = FLOAT32_TOLERANCE if self.dtype == "float32" else HALF_TOLERANCE
        tolerance *= max(1.0, float(np.abs(expected).max()))
        if self.mode == "packed" and isinstance(self.pick, LastToken) and causal:
            self.mode = "shared" if self._mode_error("shared", pairs, expected) <= tolerance else "packed"
        error = self._mode_error(self.mode, pairs, expected)
        if not error <= tolerance:
            raise ModelError(
                f"{self.spec.model.name} ({self.spec.model.architecture}) scores a pair differently in a batch than "
                f"alone, by {error:.2g}. Try --dtype float32; if that does not help, it is not supported."
            )

    def _mode_error(self, mode: str, pairs: Pairs, expected: np.ndarray) -> float:
        """Set the mode; return the largest difference of a score, infinite where attention refuses it (a sliding window)."""
        self.mode = mode
        try:
            return float(np.abs(self._logits(pairs, np.zeros(len(expected), np.int64)) - expected).max())
        except CannotPack:
            return float("inf")

    def _pick_error(self, states: list[Tensor], alone: list[PackedBatch], pick: Picker, expected: np.ndarray) -> float:
        """Return the largest difference of a score with this pick, from the states of each pair alone."""
        scores = torch.cat([self.head(pick(s, batch)) for s, batch in zip(states, alone, strict=True)])
        return float(np.abs(scores.cpu().numpy() - expected).max())

    def _logits(self, pairs: Pairs, groups: np.ndarray) -> np.ndarray:
        """Compute the scores before the activation, halving the budget until every row fits the memory."""
        tokens = pairs.tokens
        shared = np.zeros(len(groups), dtype=np.int64)
        if self.mode == "shared":
            shared = prefix_sharing.shared_prefix_lengths(tokens.ids, tokens.offsets, groups, self._left_out(pairs))
        else:  # no shared prefixes: groups of one fill rows best, and exact-length needs groups of one length
            groups = np.diff(tokens.offsets) if self.mode == "exact-length" else np.arange(len(groups))
        scores = torch.full((len(groups),), float("nan"), device=self.device)
        remaining = np.arange(len(groups))
        while len(remaining := self._score_rows(scores, pairs, groups, shared, remaining)):
            self.halve_budget(len(remaining), "pair", self.spec.limit)
        return scores.cpu().numpy()  # the only wait for the device

    def _score_rows(
        self, scores: Tensor, pairs: Pairs, groups: np.ndarray, shared: np.ndarray, documents: np.ndarray
    ) -> np.ndarray:
        """Score the pairs `documents` row by row; return the pairs that remain when a row exceeds the memory."""
        one_group = self.mode == "exact-length"
        pending = np.ones(len(groups), dtype=bool)
        for row in prefix_sharing.rows(pairs.tokens.offsets, groups, shared, self.token_budget, documents, one_group):
            row_scores = self._score_row(pairs, row)
            if row_scores is None:
                return documents[pending[documents]] if len(row.documents) > 1 else row.documents
            scores[move(row.documents, self.device)] = row_scores
            pending[row.documents] = False
            self.computed += len(row.source)
        return documents[:0]

    def _score_row(self, pairs: Pairs, row: prefix_sharing.PackedRow) -> Tensor | None:
        """Return the logits of one row, or None when the device runs out of memory."""
        batch = self._packed_batch(pairs, row)
        try:
            states = (run_equal_length if self.mode == "exact-length" else run_packed)(self.network, batch)
            if isinstance(self.pick, LastToken):
                ends = row.ends - self._left_out(pairs)[row.documents]
                return self.head(states[move(ends, self.device)])
            return self.head(self.pick(states, batch))
        except torch.OutOfMemoryError:
            return None

    def _left_out(self, pairs: Pairs) -> np.ndarray:
        """Count the tokens at the end of each pair that the pick leaves out: int64 [n]."""
        return cast(LastToken, self.pick).left_out(pairs.tokens.ids, pairs.tokens.offsets)

    def _packed_batch(self, pairs: Pairs, row: prefix_sharing.PackedRow) -> PackedBatch:
        """Move the tokens of a row to the device."""
        ids = pairs.tokens.ids[row.source]
        places = row.positions if self.padding_id is None else positions(ids, row.offsets, self.padding_id)
        kinds = None
        if self._has_token_types:  # encoders only, where every sequence of a row is a whole pair
            second = np.repeat(pairs.second[row.documents], np.diff(row.offsets))
            kinds = move(row.positions >= second, self.device)
        parents = row.parents if (row.parents >= 0).any() else None
        moved = [move(array, self.device) for array in (ids, places, row.offsets)]
        return PackedBatch(moved[0], moved[1], moved[2], row.offsets, kinds, parents)

    def _answer_ids(self) -> tuple[int, int | None]:
        """Return the token ids of the answers. Raises ModelError for an answer that is not exactly one token."""
        ids = Tokenizer(self.spec.model).contents(self.spec.answers)
        if any(len(tokens) != 1 for tokens in ids):
            raise ModelError(f"the answers {self.spec.answers} are {ids} for this tokenizer, not one token each")
        return ids[0][0], ids[1][0] if len(ids) > 1 else None
