"""At load: does this network, run our way, give what transformers gives for each text alone?

A few sequences go through the network's stock attention one by one, and then all together in our way. Packed execution
that differs is given up for exact-length batches; when those differ too the model is refused. Nothing is assumed from a
model's name: an architecture that mixes neighbours, or a library version that ignores a flag, shows itself here.
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

LENGTHS = (31, 12, 12, 7, 3, 1)  # a pair of one length, and a text of one token
LONGEST = 768  # tokens; sliding windows up to about half of it are tested beyond their reach
# Of a document's states: the largest difference relative to the largest state; in 16 bits, 1 - cosine.
FLOAT32_TOLERANCE = 1e-3
HALF_TOLERANCE = 5e-3


def choose_mode(network: "PreTrainedModel", spec: ModelSpec, padding_id: int | None, device: torch.device) -> str:
    """ "packed" or "exact-length", leaving the network set up for it. Raises ModelError when neither is exact."""
    stock = network.config._attn_implementation
    batch = _sample(network, spec, padding_id, device)
    expected = [run_equal_length(network, batch.part(i, i + 1)) for i in range(len(batch.borders) - 1)]
    check_direction(network, spec, device)
    attention.register()
    error = float("inf")
    if getattr(network, "_supports_attention_backend", False):
        network.set_attn_implementation(attention.NAME)
        error = _error(lambda: run_packed(network, batch), expected)
        if error <= _tolerance(expected):
            return "packed"
        network.set_attn_implementation(stock)
    pair = batch.part(1, 3)
    stacked = _error(lambda: run_equal_length(network, pair), expected[1:3])
    if stacked <= _tolerance(expected):
        return "exact-length"
    raise ModelError(
        f"{spec.name} ({spec.architecture}) gives another result in a batch than alone: error {error:.1e} packed and "
        f"{stacked:.1e} in batches of one length, allowed {_tolerance(expected):.0e}. Its vectors would "
        "depend on their neighbours, so it is not run. Try dtype='float32'; if that does "
        "not help, the architecture is not supported."
    )


def check_direction(network: "PreTrainedModel", spec: ModelSpec, device: torch.device) -> None:
    """A decoder asked to run bidirectionally must let the first token see the last. Raises ModelError.

    transformers before 5.2 ignores `is_causal = False` without a word.
    """
    if not spec.bidirectional:
        return
    a, b, c, d = arbitrary_ids(network, 4)
    first = [
        run_equal_length(network, flatten(np.array([a, b, last]), np.array([0, 3]), None, device))[0] for last in (c, d)
    ]
    if torch.equal(*first):
        import transformers

        raise ModelError(
            f"{spec.name} must run bidirectionally, but its first token does not see the last one: transformers "
            f"{transformers.__version__} ignores is_causal=False for {spec.architecture}. Install transformers>=5.2, "
            "or pass bidirectional=False if the model was trained with the causal mask."
        )


def is_causal(network: "PreTrainedModel", device: torch.device) -> bool:
    """Whether the states of a beginning are the same whatever follows it."""
    a, b, c, d = arbitrary_ids(network, 4)
    seen = [
        run_equal_length(network, flatten(np.array([a, b, last]), np.array([0, 3]), None, device))[:2]
        for last in (c, d)
    ]
    return torch.equal(*seen)


def _sample(network: "PreTrainedModel", spec: ModelSpec, padding_id: int | None, device: torch.device) -> PackedBatch:
    """Sequences of different lengths, one of them longer than the sliding window where that is affordable."""
    window = getattr(network.config, "sliding_window", None) or 0
    long = min(spec.max_tokens, LONGEST, 2 * window + 5)
    lengths = np.minimum([max(LENGTHS[0], long), *LENGTHS[1:]], spec.max_tokens)
    return flatten(arbitrary_ids(network, int(lengths.sum())), offsets_of(lengths), padding_id, device)


def arbitrary_ids(network: "PreTrainedModel", count: int) -> np.ndarray:
    """Arbitrary, fixed ids of the vocabulary other than the padding id: int64 [count], neighbours differ."""
    size = vocabulary_size(network)
    ids = (np.arange(count, dtype=np.int64) * 7919 + 1013) % size
    return np.asarray(np.where(ids == network.config.pad_token_id, (ids + 1) % size, ids))


def _tolerance(expected: list[Tensor]) -> float:
    return FLOAT32_TOLERANCE if expected[0].dtype == torch.float32 else HALF_TOLERANCE


def _error(run: Callable[[], Tensor], expected: list[Tensor]) -> float:
    """How far the states are from the expected ones, worst document; infinite for a network that cannot run so."""
    try:
        states = run()
    except attention.CannotPack:
        return float("inf")
    found = states.split([len(document) for document in expected])
    return max(_distance(left, right) for left, right in zip(found, expected, strict=True))


def _distance(found: Tensor, expected: Tensor) -> float:
    """float32: largest difference relative to the largest state. 16-bit, where rounding is coarse: 1 - cosine."""
    if not torch.isfinite(found).all():
        return float("inf")
    if expected.dtype == torch.float32:
        return float((found - expected).abs().max() / expected.abs().max())
    return 1 - float(torch.nn.functional.cosine_similarity(found.flatten().float(), expected.flatten().float(), dim=0))
