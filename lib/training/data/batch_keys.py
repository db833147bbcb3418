"""Tensors for the losses, from a batch of the plan."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ...errors import InputError
from ..losses import BatchKeys


def batch_keys(table: pa.Table, first: int, count: int, world: int, device: torch.device) -> BatchKeys:
    """Keys, scores and flags of a global batch, for the losses. Raises InputError where only some rows have scores."""
    teacher = None
    without = table["teacher"].null_count
    if 0 < without < table.num_rows:
        source = table["source"].filter(pc.is_null(table["teacher"]))[0]
        raise InputError(
            f"{without} rows of a batch of {table['dataset'][0]} have no scores and the others have, the first is {source}. "
            "Give all rows of a dataset `pos_scores` and `neg_scores`, or none"
        )
    if not without:
        teacher = torch.tensor(np.array(table["teacher"].to_pylist(), dtype=np.float32), device=device)
    known = table["positive_keys"].to_pylist()
    most = max(map(len, known))
    positives = np.array([keys + keys[:1] * (most - len(keys)) for keys in known], dtype=np.int64)
    passages = np.array(table["passage_keys"].to_pylist(), dtype=np.int64)
    return BatchKeys(
        query_keys=torch.tensor(table["query_key"].to_numpy(), device=device),
        passage_keys=torch.tensor(passages, device=device),
        positive_keys=torch.tensor(positives, device=device),
        teacher=teacher,
        in_batch=table["in_batch"][0].as_py(),
        first=first,
        count=count,
        world=world,
    )
