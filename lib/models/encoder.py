"""Encoder: tokens to vectors on one device, without padding."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError, UsageError
from . import self_test
from .forward import PackedBatch, check_tokens, flatten, run_equal_length, run_packed
from .load import choose_dtype, load_network, position_start, vocabulary_size
from .packing import gather, longest_first, next_cut
from .pooling import Head, pool
from .spec import ModelSpec, Tokens

if TYPE_CHECKING:
    from .bge_m3 import BgeM3Head

# Tokens a batch times bytes of a number, so 1024 tokens in float32 and 2048 in 16 bits: matrix products reach their peak
# rate and activations stay near the caches. Measured best of 512, 1024 and 2048 tokens for each precision; ten times as
# many tokens are a third slower.
CPU_BUDGET = 4096
CUDA_BUDGET = 32768  # tokens a batch
CUDA_BUDGET_LARGE = 16384  # tokens a batch, for models of about 1.5 billion parameters and more
LARGE_MODEL = 40_000  # hidden size times layers; more is a large model


class OnDevice:
    """A device with a precision and a token budget, for the model of an Encoder or Reranker.

    dtype: "float32" | "bfloat16" | "float16", the precision in use. token_budget: tokens a batch; halves for good when memory
    runs out.
    """

    def __init__(
        self, spec: ModelSpec, dtype: str, device: str | None, token_budget: int | None, threads: int | None
    ) -> None:
        if token_budget is not None and token_budget < 1:
            raise UsageError(f"token_budget={token_budget} is not a number of tokens. Give 1 or more, or leave it out.")
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision = choose_dtype(dtype, self.device)
        self.dtype = str(self.precision).removeprefix("torch.")
        self.token_budget = token_budget or default_budget(spec, self.device, self.precision)

    def halve_budget(self, count: int, what: str, limit: int) -> None:
        """Halve the token budget for good. Raises ModelError where a batch of one, `what`, is out of memory."""
        if count == 1:
            raise ModelError(
                f"One {what} of at most {limit} tokens does not fit the memory of {self.device}. Lower max_tokens, use a "
                "16-bit dtype, or a device with more memory."
            )
        self.token_budget = max(1, self.token_budget // 2)
        torch.cuda.empty_cache()


class Encoder(OnDevice):
    """A model on a device: flat tokens in, float32 vectors out. It owns the weights and serves one call at a time.

    mode: "packed", or "exact-length" for models whose attention cannot be packed exactly.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: str = "auto",
        device: str | None = None,
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Load and self-test the model, which takes seconds. threads: torch's threads, set for the whole process.

        Raises ModelError for a model that cannot be loaded or gives wrong results, UsageError for a wrong argument.
        """
        super().__init__(spec, dtype, device, token_budget, threads)
        self.spec = spec
        self._network = load_network(spec, self.precision, self.device)
        self._vocabulary = vocabulary_size(self._network)
        self._padding_id = position_start(self._network)
        self._head = Head(spec).eval().to(self.device)
        with torch.inference_mode():
            self.mode = self_test.choose_mode(self._network, spec, self._padding_id, self.device)

    @torch.inference_mode()
    def encode(self, tokens: Tokens, skip: int = 0) -> np.ndarray:
        """Encode the texts in their order: float32 [n, spec.dim]. A text without any token gets zeros.

        skip: tokens at the start of every text that the pooling leaves out, from Tokenizer.prompt_tokens. The same
        tokens give the same bits. Raises UsageError for tokens of another model, ModelError when one text alone
        exceeds the memory.
        """
        order, results = self._encode_batches(tokens, skip, None)
        return _scatter([vectors for (vectors,) in results], order, (len(tokens.offsets) - 1, self.spec.dim))

    @torch.inference_mode()
    def encode_tokens(
        self, tokens: Tokens, head: "BgeM3Head", skip: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode as `encode` does, and return the head's outputs too: [tokens] and [tokens, head.width], as tokens.ids."""
        order, results = self._encode_batches(tokens, skip, head)
        places = gather(np.arange(len(tokens.ids)), tokens.offsets, order)[0]
        vectors, weights, multiple = zip(*results, strict=True) if results else ((), (), ())
        return (
            _scatter(vectors, order, (len(tokens.offsets) - 1, self.spec.dim)),
            _scatter(weights, places, (len(places),)),
            _scatter(multiple, places, (len(places), head.width)),
        )

    def _encode_batches(
        self, tokens: Tokens, skip: int, head: "BgeM3Head | None"
    ) -> tuple[np.ndarray, list[tuple[Tensor, ...]]]:
        """Run all documents that have tokens, longest first; return their order and the outputs of each batch."""
        lengths = np.diff(tokens.offsets)
        check_tokens(tokens.ids, lengths, self._vocabulary, self.spec.max_tokens)
        order = longest_first(lengths)[: np.count_nonzero(lengths)]
        ids, borders = gather(tokens.ids, tokens.offsets, order)
        packed = flatten(ids, borders, self._padding_id, self.device)
        results: list[tuple[Tensor, ...]] = []
        start = 0
        while start < len(order):
            end = self._batch_end(borders, start)
            batch = self._encode_batch(packed.part(start, end), skip, head)
            if batch is None:
                self.halve_budget(end - start, "text", self.spec.max_tokens)
                continue
            results.append(batch)
            start = end
        return order, results

    def _encode_batch(self, batch: PackedBatch, skip: int, head: "BgeM3Head | None") -> tuple[Tensor, ...] | None:
        """Return the vectors of one batch, and the head's outputs, or None when the device runs out of memory."""
        run = run_packed if self.mode == "packed" else run_equal_length
        try:
            states = run(self._network, batch)
            vectors = self._head(pool(states, batch.offsets, self.spec.pooling, skip))
            return (vectors, *head(states)) if head else (vectors,)
        except torch.OutOfMemoryError:
            return None  # leaving the handler frees the tensors that the traceback holds

    def _batch_end(self, borders: np.ndarray, start: int) -> int:
        """Return the end of the batch that starts at document `start`; in exact-length mode it has one length only."""
        end = next_cut(borders, start, self.token_budget)
        if self.mode == "packed":
            return end
        lengths = np.diff(borders[start : end + 1])
        return start + int(np.count_nonzero(lengths == lengths[0]))


def _scatter(results: Sequence[Tensor], places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Put row i of the results at `places[i]` and zeros elsewhere. This is the only wait for the device."""
    if not results:
        return np.zeros(shape, dtype=np.float32)
    moved = torch.cat(list(results)).cpu().numpy()
    result = np.zeros(shape, dtype=moved.dtype)
    result[places] = moved
    return result


def default_budget(spec: ModelSpec, device: torch.device, precision: torch.dtype) -> int:
    """Return the default number of tokens a batch for the model on this kind of device."""
    if device.type != "cuda":
        return CPU_BUDGET // precision.itemsize
    return CUDA_BUDGET_LARGE if spec.hidden_size * spec.layers > LARGE_MODEL else CUDA_BUDGET
