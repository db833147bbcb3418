"""The two sides of a comparison of fine-tuning steps, Shoal and sentence-transformers, and batches that both can train on."""

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import click
import numpy as np
import pyarrow as pa
import torch
from torch import nn

from benchmarks.corpora import mixed_lengths
from lib.engine.malloc import M_MMAP_THRESHOLD, return_large_blocks
from lib.models.spec_reader import read_spec
from lib.training.data.batches import BATCHES
from lib.training.data.pairs import text_keys
from lib.training.loop import RankBatch
from lib.training.losses.infonce import InfoNCE
from lib.training.models.embedder import EmbedderTrainable
from lib.training.step.chunks import Chunker
from lib.training.step.collectives import Rank
from lib.training.step.grad_cache import Autocast
from lib.training.step.optimizer import Optimization
from lib.training.step.parallel import SingleProcess

TOKENS = 3, 256  # of a text
SCALE = 20.0  # of the cosine: 1 / temperature
OPTIMIZATION = Optimization(learning_rate=2e-5)
CPU = torch.device("cpu")
CLOSE = 1e-4  # losses, and gradients relative to their norm


class Contender(Protocol):
    network: nn.Module

    def gradients(self, batch: pa.Table, seed: int) -> float:
        """Compute the gradients of a batch of texts and leave them in the weights; returns the loss."""
        ...

    def weights(self) -> dict[str, nn.Parameter]:
        """The weights by their names in the transformers network."""
        ...

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """Remove the gradients, before a step."""
        ...


class Shoal:
    """Our step as a worker does it."""

    def __init__(
        self, model: str, token_budget: int, device: torch.device = CPU, autocast: Autocast = nullcontext
    ) -> None:
        spec = read_spec(model)
        embedder = EmbedderTrainable(spec, ("", ""), (spec.max_tokens, spec.max_tokens))
        trainee = embedder.load(device)
        self.network, self._backbone = trainee.network.train(), trainee.backbone
        chunker, loss = Chunker(token_budget, device, trainee.padding_id), InfoNCE(temperature=1 / SCALE)
        self._alone, self._device = SingleProcess(self.network), device
        self._step = embedder.step_factory()(self._alone, loss, chunker, autocast)
        self._texts = embedder.row_tokenizer()

    def gradients(self, batch: pa.Table, seed: int) -> float:
        rank = Rank(0, 1, 1, batch.num_rows)
        return float(self._step(RankBatch(batch, self._texts(batch)).inputs_of(rank, seed, self._device)))

    def weights(self) -> dict[str, nn.Parameter]:
        return dict(self._backbone.network.named_parameters())

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        self._alone.zero_gradients(optimizer)


class Peer:
    """CachedMultipleNegativesRankingLoss, on what the data collator of its Trainer makes of the texts."""

    def __init__(self, model: str, device: torch.device = CPU, autocast: Autocast = nullcontext) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

        self._device, self._autocast = device, autocast
        self.network = SentenceTransformer(model, device=str(device)).train()
        self._loss = CachedMultipleNegativesRankingLoss(self.network, scale=SCALE)
        self._collate = SentenceTransformerDataCollator(preprocess_fn=self.network.preprocess)

    def use(self, setting: tuple[str, int]) -> None:
        """setting: a parameter of the loss, mini_batch_size or mini_batch_num_tokens, and its value."""
        self._loss.mini_batch_size, self._loss.mini_batch_num_tokens = 32, None  # its own
        setattr(self._loss, *setting)

    def gradients(self, batch: pa.Table, seed: int) -> float:
        torch.manual_seed(seed)
        rows = zip(batch["query"].to_pylist(), batch["passages"].to_pylist(), strict=True)
        given = [{"anchor": query} | {f"passage{i}": text for i, text in enumerate(texts)} for query, texts in rows]
        inputs = self._collate(given)
        features = [_column(inputs, f"{name}_", self._device) for name in given[0]]
        with self._autocast():  # the backward too, for it runs the forward again
            value = self._loss(features, None)
            value.backward()
        return float(value.detach())

    def weights(self) -> dict[str, nn.Parameter]:
        return dict(self.network[0].auto_model.named_parameters())

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()


def great_blocks_together() -> None:
    """Set malloc as glibc does by itself after some blocks of 32 MiB: the peer runs so."""
    m_trim_threshold = -1
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    library.mallopt(m_trim_threshold, 64 << 20)


HEAPS = {"shoal": return_large_blocks, "sentence-transformers": great_blocks_together}


def _column(inputs: dict[str, Any], prefix: str, device: torch.device) -> dict[str, Any]:
    """Select the part of the collator's batch that belongs to one column, as the Trainer's collect_features does."""
    found = {name.removeprefix(prefix): value for name, value in inputs.items() if name.startswith(prefix)}
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in found.items()}


def batches(count: int, rows: int, group: int, seed: int) -> list[pa.Table]:
    """Global batches as the plan has them, each of texts that are all different: the peer knows no duplicates."""
    return unlike(mixed_lengths(2 * count * rows * (1 + group) + 1000, TOKENS, seed), count, rows, group)


def unlike(texts: list[str], count: int, rows: int, group: int) -> list[pa.Table]:
    """Global batches of the first texts that are all different inside each."""
    wanted = rows * (1 + group)
    keys, place, found = text_keys(pa.array(texts, pa.large_string())), 0, []
    for _ in range(count):
        taken: dict[int, str] = {}
        while len(taken) < wanted:
            taken.setdefault(int(keys[place]), texts[place])
            place += 1
        found.append(_table(list(taken.values()), np.array(list(taken)), rows, group))
    return found


def _table(texts: list[str], keys: np.ndarray, rows: int, group: int) -> pa.Table:
    passages = [texts[rows + row * group : rows + (row + 1) * group] for row in range(rows)]
    passage_keys = keys[rows:].reshape(rows, group)
    data = {"dataset": ["mixed"] * rows, "in_batch": [True] * rows, "query": texts[:rows], "prompt": [None] * rows}
    data |= {"passages": passages, "query_key": keys[:rows], "passage_keys": passage_keys.tolist()}
    data |= {"positive_keys": passage_keys[:, :1].tolist(), "teacher": [None] * rows, "source": [""] * rows}
    return pa.table(data, BATCHES)


def trainer(contender: Contender) -> Callable[[pa.Table, int], float]:
    """A whole training step of a contender; returns its seconds."""
    optimizer = OPTIMIZATION.optimizer(contender.network)

    def step(batch: pa.Table, seed: int) -> float:
        gc.collect()
        began = time.perf_counter()
        contender.clear(optimizer)
        contender.gradients(batch, seed)
        nn.utils.clip_grad_norm_(contender.network.parameters(), OPTIMIZATION.clip)
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def agreement(shoal: Shoal, peer: Peer, batch: pa.Table) -> tuple[float, float]:
    """How far losses and gradients are apart without dropout, the gradients relative to their norm. Raises ClickException
    where they do not agree: what is not the same must not be compared."""
    losses, gradients = [], []
    for contender in (shoal, peer):
        contender.network.eval()
        contender.network.zero_grad()
        losses.append(contender.gradients(batch, seed=0))
        weights = contender.weights()
        gradients.append({name: each.grad.double() for name, each in weights.items() if each.grad is not None})
        contender.network.zero_grad()
        contender.network.train()
    ours, theirs = gradients
    if ours.keys() != theirs.keys():
        raise click.ClickException(f"not the same weights have gradients: {sorted(ours.keys() ^ theirs.keys())}")
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours) ** 0.5
    norm = sum(float(each.square().sum()) for each in theirs.values()) ** 0.5
    off = abs(losses[0] - losses[1]), apart / norm
    if not max(off) <= CLOSE:
        raise click.ClickException(f"losses {losses[0]:.6f} and {losses[1]:.6f}, gradients {off[1]:.1e} apart")
    return off


def tokens_of(batch: pa.Table, model: str) -> np.ndarray:
    """Tokens of every text of a batch."""
    spec = read_spec(model)
    texts = EmbedderTrainable(spec, ("", ""), (spec.max_tokens, spec.max_tokens)).row_tokenizer()
    return np.diff(texts(batch).tokens.offsets)
