"""Every loss on a few rows of the data it is meant for, in the driver: what data and loss do not agree on is told there."""

from collections.abc import Mapping
from typing import Any

import torch

from ..losses import RERANKING, TEXT, Batch, Scores
from ..losses.m3_unified import M3Unified
from .order import Order
from .tables import rows_of

ROWS = 8


def rehearse(order: Order, losses: Mapping[str, Any], dim: int) -> None:
    """Raises InputError, as the losses do, for data without the scores or negatives that its loss asks for."""
    cpu = torch.device("cpu")
    for dataset, step in order.first_steps().items():
        loss = losses.get(dataset, losses[""])
        if isinstance(loss, M3Unified):  # asks for what tokens give, and nothing of the data
            continue
        table = order.read(step).slice(0, ROWS)
        rows = rows_of(table, 0, table.num_rows, 1, cpu)
        count, group = rows.passage_keys.shape
        if loss.of in (RERANKING, TEXT):
            loss(Scores(rows, torch.zeros(count, group)))
        else:
            loss(Batch(rows, torch.randn(count, dim), torch.randn(count, group, dim), gather=lambda tensor: tensor))
