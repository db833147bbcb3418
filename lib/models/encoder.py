"""Encoder: tokens to vectors on one device, without padding."""

from collections.abc import Callable, Sequence
from typing import Protocol

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

# Tokens a batch times bytes of a number, so 1024 tokens in float32 and 2048 in 16 bits: matrix products reach their peak
# rate and activations stay near the caches. Measured best of 512, 1024 and 2048 tokens for each precision; ten times as
# many tokens are a third slower.
CPU_BUDGET = 4096
CUDA_BUDGET = 32768  # tokens a batch
CUDA_BUDGET_LARGE = 16384  # tokens a batch, for models of about 1.5 billion parameters and more
LARGE_MODEL = 40_000  # hidden size times layers; more is a large model


class TokenHead(Protocol):
    """Layers on the states of single tokens."""

    width: int

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States [tokens, hidden] -> [tokens] and [tokens, width]."""
        ...


class Encoder:
    """A model on a device: flat tokens in, float32 vectors out. It owns the weights and serves one call at a time.

    dtype: "float32" | "bfloat16" | "float16", the precision in use. mode: "packed", or "exact-length" for models whose
    attention cannot be packed exactly. token_budget: tokens a batch; halves for good when memory runs out.
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
        if token_budget is not None and token_budget < 1:
            raise UsageError(f"token_budget={token_budget} is not a number of tokens. Give 1 or more, or leave it out.")
        if threads is not None:
            torch.set_num_threads(threads)
        self.spec = spec
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        precision = choose_dtype(dtype, self.device)
        self.dtype = str(precision).removeprefix("torch.")
        self.token_budget = token_budget or default_budget(spec, self.device, precision)
        self._network = load_network(spec, precision, self.device)
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
        order, results = self._encode_batches(tokens, lambda states, batch: (self._pooled(states, batch, skip),))
        return _scatter([vectors for (vectors,) in results], order, (len(tokens.offsets) - 1, self.spec.dim))

    @torch.inference_mode()
    def encode_tokens(
        self, tokens: Tokens, head: TokenHead, skip: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode as `encode` does, and return the head's outputs for every token too.

        The outputs for tokens are [tokens] and [tokens, head.width], in the order of tokens.ids.
        """
        order, results = self._encode_batches(
            tokens, lambda states, batch: (self._pooled(states, batch, skip), *head(states))
        )
        places = gather(np.arange(len(tokens.ids)), tokens.offsets, order)[0]
        vectors, weights, multiple = zip(*results, strict=True) if results else ((), (), ())
        return (
            _scatter(vectors, order, (len(tokens.offsets) - 1, self.spec.dim)),
            _scatter(weights, places, (len(places),)),
            _scatter(multiple, places, (len(places), head.width)),
        )

    def _pooled(self, states: Tensor, batch: PackedBatch, skip: int) -> Tensor:
        """Pool the token states of a batch into vectors."""
        return self._head(pool(states, batch.offsets, self.spec.pooling, skip))

    def _encode_batches(
        self, tokens: Tokens, outputs: Callable[[Tensor, PackedBatch], tuple[Tensor, ...]]
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
            batch = self._encode_batch(packed.part(start, end), outputs)
            if batch is None:
                self._halve_budget(end - start)
                continue
            results.append(batch)
            start = end
        return order, results

    def _encode_batch(
        self, batch: PackedBatch, outputs: Callable[[Tensor, PackedBatch], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...] | None:
        """Return the outputs of one batch, or None when the device runs out of memory."""
        run = run_packed if self.mode == "packed" else run_equal_length
        try:
            return outputs(run(self._network, batch), batch)
        except torch.OutOfMemoryError:
            return None  # leaving the handler frees the tensors that the traceback holds

    def _batch_end(self, borders: np.ndarray, start: int) -> int:
        """Return the end of the batch that starts at document `start`; in exact-length mode it has one length only."""
        end = next_cut(borders, start, self.token_budget)
        if self.mode == "packed":
            return end
        lengths = np.diff(borders[start : end + 1])
        return start + int(np.count_nonzero(lengths == lengths[0]))

    def _halve_budget(self, documents: int) -> None:
        """Halve the token budget for good. Raises ModelError where a batch of one document is out of memory."""
        if documents == 1:
            raise ModelError(
                f"One text of at most {self.spec.max_tokens} tokens does not fit the memory of {self.device}. "
                "Lower max_tokens, use a 16-bit dtype, or a device with more memory."
            )
        self.token_budget = max(1, self.token_budget // 2)
        torch.cuda.empty_cache()


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
