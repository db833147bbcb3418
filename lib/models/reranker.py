"""Pairs to scores on one device, without padding; what the pairs of a query share is computed once where that is exact."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError
from . import prefix_sharing, self_test
from .attention import CannotPack
from .encoder import default_budget
from .forward import PackedBatch, check_tokens, move, positions, run_equal_length, run_packed
from .load import choose_dtype, load_network, position_start, vocabulary_size
from .packing import offsets_of
from .pair_tokenizer import Pairs
from .reranker_spec import RerankSpec
from .score_heads import Classifier, TokenLogits, load_classifier
from .spec import Tokens
from .tokenizer import Tokenizer

LENGTHS = (31, 12, 12, 7, 5)  # tokens of the self-test's pairs
BEGINNING = 4  # tokens that they share
FLOAT32_TOLERANCE, HALF_TOLERANCE = 1e-3, 3e-2  # of the largest score, at least of 1
Picker = Callable[[Tensor, Tensor], Tensor]


class RerankerParts(NamedTuple):
    """A loaded reranker, for training: the network in `mode`, whose picked states the head scores."""

    network: torch.nn.Module
    head: torch.nn.Module
    pick: Picker
    mode: str
    padding_id: int | None


def first_token(states: Tensor, offsets: Tensor) -> Tensor:
    return states[offsets[:-1]]


def last_token(states: Tensor, offsets: Tensor) -> Tensor:
    return states[offsets[1:] - 1]


def mean_of_tokens(states: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(states.float(), "mean", offsets=offsets, unsafe=True).to(states.dtype)


class Reranker:
    """A reranker on a device: pairs in, float32 scores out. Holds the weights; one call at a time.

    dtype: the precision in use. mode: "shared" where the beginning of a query's pairs is computed once, "packed", or
    "exact-length" for models whose attention cannot be packed exactly. token_budget halves for good when memory runs out.
    computed: tokens that the network has seen, shared beginnings once a row.
    """

    def __init__(
        self,
        spec: RerankSpec,
        *,
        dtype: str = "auto",
        device: str | None = None,
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Load and self-test the model (seconds). Raises ModelError for one that cannot be loaded, or scores wrongly."""
        if threads is not None:
            torch.set_num_threads(threads)
        self.spec = spec
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        precision = choose_dtype(dtype, self.device)
        self.dtype = str(precision).removeprefix("torch.")
        self.token_budget = token_budget or default_budget(spec.model, self.device, precision)
        self.computed = 0
        if spec.answers:
            self._load_language_model(precision)
        else:
            self._load_classifier(precision)

    @torch.inference_mode()
    def score(self, pairs: Pairs, groups: np.ndarray) -> np.ndarray:
        """Scores of the pairs in their order: float32 [n], after the spec's activation.

        groups: int64 [n], equal for pairs that are likely to begin alike: those of one query. Which pairs are scored
        together changes nothing but the time. Raises UsageError for pairs of another model's pair_format.
        """
        check_tokens(pairs.tokens.ids, np.diff(pairs.tokens.offsets), self._vocabulary, self.spec.limit)
        logits = self._logits(pairs, groups)
        return 1 / (1 + np.exp(-logits)) if self.spec.activation == "sigmoid" else logits

    def parts(self) -> RerankerParts:
        mode = "packed" if self.mode == "shared" else self.mode
        return RerankerParts(self._network, self._head, self._pick, mode, self._padding_id)

    def _load_language_model(self, precision: torch.dtype) -> None:
        self._network = load_network(self.spec.model, precision, self.device)
        self._head: torch.nn.Module = TokenLogits(self._network, self.spec.model.folder, *self._answer_ids())
        self._head.to(self.device)
        self._kinds = False
        pairs = self._sample()
        with torch.no_grad():  # what inference mode leaves in buffers could not be trained with
            expected = self._alone(
                pairs, lambda ids, _: self._head(self._network(input_ids=ids).last_hidden_state[:, -1])
            )
            self._choose(pairs, expected, (last_token,))

    def _load_classifier(self, precision: torch.dtype) -> None:
        whole = load_classifier(self.spec.model.folder, precision, self.device)
        self._kinds = int(getattr(whole.config, "type_vocab_size", 0) or 0) > 1
        self._network = getattr(whole, whole.base_model_prefix)
        pairs = self._sample()
        with torch.no_grad():  # what inference mode leaves in buffers could not be trained with
            expected = self._alone(pairs, lambda ids, kinds: whole(input_ids=ids, **kinds).logits.float()[:, 0])
            self._head = Classifier(whole)
            self._choose(pairs, expected, (first_token, last_token, mean_of_tokens))

    def _choose(self, pairs: Pairs, expected: np.ndarray, picks: tuple[Picker, ...]) -> None:
        """Set picker and mode. What a network pools and what it can do is found out, never assumed.

        Each pair alone tells the picker; the network's states tell whether it packs; and whether it is causal, so that a
        beginning does not depend on what follows. In the end all of it together must give the expected scores.
        """
        self._vocabulary, self._padding_id = vocabulary_size(self._network), position_start(self._network)
        alone = [run_equal_length(self._network, self._flat(pairs, row)) for row in self._rows(pairs, 1)]
        distances = [self._distance(alone, pick, expected) for pick in picks]
        self._pick = picks[int(np.argmin(distances))]
        causal = self_test.is_causal(self._network, self.device)
        self.mode = self_test.choose_mode(self._network, self.spec.model, self._padding_id, self.device)
        allowed = FLOAT32_TOLERANCE if self.dtype == "float32" else HALF_TOLERANCE
        allowed *= max(1.0, float(np.abs(expected).max()))
        if self.mode == "packed" and self._pick is last_token and causal:
            self.mode = "shared" if self._error("shared", pairs, expected) <= allowed else "packed"
        error = self._error(self.mode, pairs, expected)
        if not error <= allowed:
            raise ModelError(
                f"{self.spec.model.name} ({self.spec.model.architecture}) scores a pair differently in a batch than "
                f"alone, by {error:.2g}. Try --dtype float32; if that does not help, it is not supported."
            )

    def _error(self, mode: str, pairs: Pairs, expected: np.ndarray) -> float:
        """The largest difference of a score in this mode; infinite where attention cannot do it (a sliding window)."""
        self.mode = mode
        try:
            return float(np.abs(self._logits(pairs, np.zeros(len(expected), np.int64)) - expected).max())
        except CannotPack:
            return float("inf")

    def _distance(self, alone: list[Tensor], pick: Picker, expected: np.ndarray) -> float:
        borders = [torch.tensor([0, len(states)], device=self.device) for states in alone]
        found = torch.cat([self._head(pick(s, b)) for s, b in zip(alone, borders, strict=True)])
        return float(np.abs(found.cpu().numpy() - expected).max())

    def _logits(self, pairs: Pairs, groups: np.ndarray) -> np.ndarray:
        tokens = pairs.tokens
        shared = np.zeros(len(groups), dtype=np.int64)
        if self.mode == "shared":
            shared = prefix_sharing.shared_prefix_lengths(tokens.ids, tokens.offsets, groups)
        else:  # nothing is shared: rows fill up best with groups of one, and exact-length needs groups of one length
            groups = np.diff(tokens.offsets) if self.mode == "exact-length" else np.arange(len(groups))
        scores = torch.full((len(groups),), float("nan"), device=self.device)
        left = np.arange(len(groups))
        while len(left := self._fill(scores, pairs, groups, shared, left)):
            self._halve(len(left))
        return scores.cpu().numpy()  # the only wait for the device

    def _fill(
        self, scores: Tensor, pairs: Pairs, groups: np.ndarray, shared: np.ndarray, documents: np.ndarray
    ) -> np.ndarray:
        """Score the pairs `documents`. What is left when the memory does not hold a row; nothing when all are scored."""
        one_group = self.mode == "exact-length"
        left = np.ones(len(groups), dtype=bool)
        for row in prefix_sharing.rows(pairs.tokens.offsets, groups, shared, self.token_budget, documents, one_group):
            found = self._run(pairs, row)
            if found is None:
                return documents[left[documents]] if len(row.documents) > 1 else row.documents
            scores[move(row.documents, self.device)] = found
            left[row.documents] = False
            self.computed += len(row.source)
        return documents[:0]

    def _run(self, pairs: Pairs, row: prefix_sharing.PackedRow) -> Tensor | None:
        """Logits of one row, or None when the device's memory does not hold it."""
        batch = self._flat(pairs, row)
        try:
            states = (run_equal_length if self.mode == "exact-length" else run_packed)(self._network, batch)
            if self._pick is last_token:
                return self._head(states[move(row.ends, self.device)])
            return self._head(self._pick(states, batch.offsets))
        except torch.OutOfMemoryError:
            return None

    def _flat(self, pairs: Pairs, row: prefix_sharing.PackedRow) -> PackedBatch:
        ids = pairs.tokens.ids[row.source]
        places = row.positions if self._padding_id is None else positions(ids, row.offsets, self._padding_id)
        kinds = None
        if self._kinds:  # encoders only, where every piece of a row is a whole pair
            second = np.repeat(pairs.second[row.documents], np.diff(row.offsets))
            kinds = move(row.positions >= second, self.device)
        parents = row.parents if (row.parents >= 0).any() else None
        moved = [move(array, self.device) for array in (ids, places, row.offsets)]
        return PackedBatch(moved[0], moved[1], moved[2], row.offsets, kinds, parents)

    def _halve(self, pairs: int) -> None:
        if pairs == 1:
            raise ModelError(
                f"One pair of at most {self.spec.limit} tokens does not fit the memory of {self.device}. "
                "Lower --max-tokens, use a 16-bit --dtype, or a device with more memory."
            )
        self.token_budget = max(1, self.token_budget // 2)
        torch.cuda.empty_cache()

    def _answer_ids(self) -> tuple[int, int | None]:
        """Raises ModelError for an answer that is not one token: training and scoring would read different ones."""
        ids = Tokenizer(self.spec.model).contents(self.spec.answers)
        if any(len(each) != 1 for each in ids):
            raise ModelError(f"the answers {self.spec.answers} are {ids} for this tokenizer, not one token each")
        return ids[0][0], ids[1][0] if len(ids) > 1 else None

    def _sample(self) -> Pairs:
        """Pairs of arbitrary ids and different lengths that begin alike."""
        lengths = np.minimum(LENGTHS, self.spec.model.max_tokens)
        offsets = offsets_of(lengths)
        ids = self_test.arbitrary_ids(self._network, int(offsets[-1]))
        for start, end in pairwise(offsets):
            ids[start : min(start + BEGINNING, end)] = ids[: min(BEGINNING, end - start)]
        tokens = Tokens(ids.astype(np.int32), offsets, np.zeros(len(lengths), dtype=bool))
        return Pairs(tokens, lengths // 2)

    def _rows(self, pairs: Pairs, budget: int) -> list[prefix_sharing.PackedRow]:
        """The pairs in their order, one a row."""
        nothing = np.zeros(len(pairs.second), dtype=np.int64)
        each = (np.array([number]) for number in range(len(nothing)))
        return [
            row
            for one in each
            for row in prefix_sharing.rows(pairs.tokens.offsets, nothing, nothing, budget, one, True)
        ]

    def _alone(self, pairs: Pairs, score: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> np.ndarray:
        """Each pair by itself through the network as transformers runs it."""
        found = []
        for start, end, second in zip(pairs.tokens.offsets, pairs.tokens.offsets[1:], pairs.second, strict=False):
            ids = move(pairs.tokens.ids[start:end], self.device)[None]
            kinds = {"token_type_ids": (torch.arange(end - start, device=self.device) >= second).long()[None]}
            found.append(float(score(ids, kinds if self._kinds else {})[0]))
        return np.array(found, dtype=np.float32)
