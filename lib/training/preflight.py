"""Every loss on a few rows of the data it is meant for, in the driver: what data and loss do not agree on is told there."""

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError
from .data.batch_reader import BatchReader
from .data.tensors import rows_of
from .losses import RERANKING, TEXT, Batch, Scores
from .losses.m3_unified import M3Unified

ROWS = 1024  # of the first batch of a dataset


def try_largest_batch(order: BatchReader, losses: Mapping[str, Any], dim: int, learn_temperature: bool) -> None:
    """Raises InputError, as the losses do, for data without the scores or negatives that its loss asks for."""
    cpu = torch.device("cpu")
    for dataset, step in order.first_steps().items():
        loss = losses.get(dataset, losses[""])
        if isinstance(loss, M3Unified):  # asks for what tokens give, and nothing of the data
            continue
        table = order.read(step).slice(0, ROWS)
        rows = rows_of(table, 0, table.num_rows, 1, cpu)
        if loss.of != TEXT and bool((rows.query_keys == rows.passage_keys[:, 0]).all()):
            raise InputError(
                f"{dataset} has texts alone, which are for pretraining, and the loss is of {loss.of}. Give `query` and "
                "`pos`, or --loss retromae"
            )
        count, group = rows.passage_keys.shape
        if loss.of in (RERANKING, TEXT):
            outputs = torch.randn(count, group, requires_grad=True)
            value = loss(Scores(rows, outputs))
        else:
            outputs = torch.randn(count, 1 + group, dim, requires_grad=True)
            queries, passages = outputs[:, 0], outputs[:, 1:]
            sharpness = torch.zeros((), requires_grad=True)
            value = loss(Batch(rows, queries, passages, gather=lambda tensor: tensor, sharpness=sharpness))
            if learn_temperature and not torch.autograd.grad(value, sharpness, retain_graph=True, allow_unused=True)[0]:
                raise InputError(
                    f"the loss of {dataset} has no temperature that could be learned. Leave --learn-temperature out"
                )
        value.backward()
        if group == 1 and loss.of != TEXT and (outputs.grad is None or not bool(outputs.grad.any())):
            raise InputError(
                f"{dataset} has one passage a row, from which this loss learns nothing. Give `neg`, and --group 2 or more"
            )
