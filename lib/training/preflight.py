"""Try each loss on a batch of its dataset, in the driver, so that a mismatch is reported before any worker starts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..errors import InputError
from ..models.tokenizer import Tokenizer
from .config import FinetunePlan
from .data.batch_keys import batch_keys
from .data.batch_reader import BatchReader
from .losses import RERANKING, TEXT, Batch, BatchKeys, Scores
from .losses.m3_unified import M3Unified

ROWS = 1024  # rows tried, of the first batch of a dataset


def check_prompts(plan: FinetunePlan) -> None:
    """Raises UsageError for a prompt that leaves no token for a query, or for a passage."""
    for prompt, tokens in zip(plan.prompts, plan.tokens, strict=True):
        if prompt:
            Tokenizer(replace(plan.spec, max_tokens=tokens)).tokens_of_prompt(prompt)


def try_losses(reader: BatchReader, losses: Mapping[str, Any], dim: int, learn_temperature: bool) -> None:
    """Compute each loss and its gradients on random outputs for the first batch of each dataset.

    Raises InputError for a dataset without the scores or negatives that its loss needs.
    """
    for dataset, step in reader.first_steps().items():
        loss = losses.get(dataset, losses[""])
        if isinstance(loss, M3Unified):  # needs token outputs, and nothing of the data
            continue
        table = reader.read(step).slice(0, ROWS)
        keys = batch_keys(table, 0, table.num_rows, 1, torch.device("cpu"))
        if loss.kind != TEXT and bool((keys.query_keys == keys.passage_keys[:, 0]).all()):
            raise InputError(
                f"{dataset} has texts alone, which are for pretraining, and the loss is of {loss.kind}. Give `query` and "
                "`pos`, or --loss retromae"
            )
        if loss.kind in (RERANKING, TEXT):
            outputs = _try_scores(loss, keys)
        else:
            outputs = _try_vectors(loss, keys, dim, dataset if learn_temperature else None)
        one_passage = keys.passage_keys.shape[1] == 1
        if one_passage and loss.kind != TEXT and (outputs.grad is None or not bool(outputs.grad.any())):
            raise InputError(
                f"{dataset} has one passage a row, from which this loss learns nothing. Give `neg`, and --group 2 or more"
            )


def _try_scores(loss: Any, keys: BatchKeys) -> torch.Tensor:
    """Random scores with their gradients."""
    scores = torch.randn(keys.passage_keys.shape, requires_grad=True)
    loss(Scores(keys, scores)).backward()
    return scores


def _try_vectors(loss: Any, keys: BatchKeys, dim: int, learns_temperature: str | None) -> torch.Tensor:
    """Random vectors with their gradients. learns_temperature: the dataset, where the loss must have a temperature."""
    count, group = keys.passage_keys.shape
    vectors = torch.randn(count, 1 + group, dim, requires_grad=True)
    logit_scale = torch.zeros((), requires_grad=True)
    batch = Batch(keys, vectors[:, 0], vectors[:, 1:], gather=lambda tensor: tensor, logit_scale=logit_scale)
    loss(batch).backward()
    if learns_temperature is not None and (logit_scale.grad is None or not bool(logit_scale.grad)):
        raise InputError(
            f"the loss of {learns_temperature} has no temperature that could be learned. Leave --learn-temperature out"
        )
    return vectors
