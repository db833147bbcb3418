"""Self-test at load: check that packed execution gives the states that transformers gives for each text alone.

A few sequences run through the network's stock attention one by one, and then packed. A model whose packed states differ
runs in exact-length batches; a model whose states differ there too is refused. Nothing is assumed from a model's name: the
test detects an architecture that mixes neighbours, and a library version that ignores a flag.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError
from . import attention
from .forward import PackedBatch, flatten, run_equal_length, run_packed
from .load import vocabulary_size
from .packing import offsets_of
from .spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE_LENGTHS = (31, 12, 12, 7, 3, 1)  # tokens; two texts of one length, and one text of one token
LONGEST_SAMPLE = 768  # tokens; windows up to about half of it are exceeded
# Largest difference of a document's states relative to the largest state; in 16 bits, 1 - cosine.
FLOAT32_TOLERANCE = 1e-3
HALF_TOLERANCE = 5e-3


def choose_mode(network: "PreTrainedModel", spec: ModelSpec, padding_id: int | None, device: torch.device) -> str:
    """Return "packed" or "exact-length", and set the network up for it. Raises ModelError when neither is exact."""
    stock = network.config._attn_implementation
    batch = _sample(network, spec, padding_id, device)
    expected = [run_equal_length(network, batch.part(i, i + 1)) for i in range(len(batch.borders) - 1)]
    if spec.bidirectional and is_causal(
        network, device
    ):  # transformers before 5.2 ignores `is_causal = False` silently
        import transformers

        raise ModelError(
            f"{spec.name} must run bidirectionally, but its first token does not see the last one: transformers "
            f"{transformers.__version__} ignores is_causal=False for {spec.architecture}. Install transformers>=5.2, "
            "or pass bidirectional=False if the model was trained with the causal mask."
        )
    attention.register()
    error = float("inf")
    if getattr(network, "_supports_attention_backend", False):
        network.set_attn_implementation(attention.NAME)
        error = _error(lambda: run_packed(network, batch), expected)
        if error <= _tolerance(expected):
            return "packed"
        network.set_attn_implementation(stock)
    stacked_error = _error(lambda: run_equal_length(network, batch.part(1, 3)), expected[1:3])
    if stacked_error <= _tolerance(expected):
        return "exact-length"
    raise ModelError(
        f"{spec.name} ({spec.architecture}) gives another result in a batch than alone: error {error:.1e} packed and "
        f"{stacked_error:.1e} in batches of one length, allowed {_tolerance(expected):.0e}. Its vectors would "
        "depend on their neighbours, so it is not run. Try dtype='float32'; if that does not help, the architecture is "
        "not supported."
    )


def is_causal(network: "PreTrainedModel", device: torch.device) -> bool:
    """Return whether the states of a prefix are the same whatever follows it."""
    a, b, c, d = arbitrary_ids(network, 4)
    prefixes = [
        run_equal_length(network, flatten(np.array([a, b, last]), np.array([0, 3]), None, device))[:2]
        for last in (c, d)
    ]
    return torch.equal(*prefixes)


def _sample(network: "PreTrainedModel", spec: ModelSpec, padding_id: int | None, device: torch.device) -> PackedBatch:
    """Return sequences of different lengths, one of them longer than the sliding window, up to LONGEST_SAMPLE."""
    window = getattr(network.config, "sliding_window", None) or 0
    longest = min(spec.max_tokens, LONGEST_SAMPLE, 2 * window + 5)
    lengths = np.minimum([max(SAMPLE_LENGTHS[0], longest), *SAMPLE_LENGTHS[1:]], spec.max_tokens)
    return flatten(arbitrary_ids(network, int(lengths.sum())), offsets_of(lengths), padding_id, device)


def arbitrary_ids(network: "PreTrainedModel", count: int) -> np.ndarray:
    """Return arbitrary, fixed ids other than the padding id: int64 [count], no two neighbours equal."""
    size = vocabulary_size(network)
    ids = (np.arange(count, dtype=np.int64) * 7919 + 1013) % size
    return np.asarray(np.where(ids == network.config.pad_token_id, (ids + 1) % size, ids))


def _tolerance(expected: list[Tensor]) -> float:
    """Return the tolerance for the precision of the states."""
    return FLOAT32_TOLERANCE if expected[0].dtype == torch.float32 else HALF_TOLERANCE


def _error(run: Callable[[], Tensor], expected: list[Tensor]) -> float:
    """Return the distance of the worst document from its expected states; infinite for a network that cannot run packed."""
    try:
        states = run()
    except attention.CannotPack:
        return float("inf")
    states_of_documents = states.split([len(document) for document in expected])
    return max(_distance(left, right) for left, right in zip(states_of_documents, expected, strict=True))


def _distance(states: Tensor, expected: Tensor) -> float:
    """Compare states: in float32 the largest difference relative to the largest state, in 16 bits 1 - cosine."""
    if not torch.isfinite(states).all():
        return float("inf")
    if expected.dtype == torch.float32:
        return float((states - expected).abs().max() / expected.abs().max())
    return 1 - float(torch.nn.functional.cosine_similarity(states.flatten().float(), expected.flatten().float(), dim=0))
