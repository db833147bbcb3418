"""Gradients of a training step in several processes: `run(cases, folder)` starts four ranks, which compute every case.

A case is one step on a tiny model at a world size of 1, 2, 3 or 4. The first rank saves the loss, the gradients and the number of
collective operations; `plain` computes the reference: one large batch without chunks or ranks.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from lib.models.packing import offsets_of
from lib.models.spec import Tokens
from lib.models.spec_reader import read_spec
from lib.training import losses
from lib.training.losses import EMBEDDING, RERANKING, TEXT, Batch, BatchKeys, Scores
from lib.training.losses.matryoshka import Matryoshka
from lib.training.models.bge_m3 import BgeM3Network, token_outputs_of
from lib.training.models.networks import VectorNetwork, load_backbone
from lib.training.models.retromae_model import RetroMAE
from lib.training.step import grad_cache
from lib.training.step.chunks import Chunker
from lib.training.step.collectives import Rank
from lib.training.step.grad_cache import AccumulatingStep, GradCacheStep, StepInputs
from lib.training.step.parallel import DDPModel, FSDPModel, SingleProcess
from lib.training.step.trainable import Inputs

ROWS, GROUP, VIRTUAL_RANKS = 8, 3, 4
UNIFIED = "m3-unified"
CPU = torch.device("cpu")


token_outputs = partial(token_outputs_of, (0, 2, 3))


@dataclass(frozen=True)
class Case:
    """One step. loss: for losses.parse, or "matryoshka": InfoNCE at two sizes. budget: tokens a chunk. broken: a mistake."""

    loss: str
    world: int = 1
    parallel: str = "ddp"
    budget: int = 40
    double: bool = True
    broken: str = ""
    virtual_ranks: int = VIRTUAL_RANKS

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values()).replace(":", "_")


def loss_of(case: Case):
    if case.loss == "matryoshka":
        return Matryoshka(losses.parse(("infonce:temperature=0.05",)), (8, 32), (0.5, 0.5))
    return losses.parse((case.loss,))


class PairScores(torch.nn.Module):
    """A minimal reranker: a linear score of the pooled vector."""

    def __init__(self, network: VectorNetwork) -> None:
        super().__init__()
        self.vectors = network
        self.score = torch.nn.Linear(32, 1)

    def forward(self, batch):
        return (self.score(self.vectors(batch)[0]).squeeze(1),)


@cache
def loaded(model: str):
    """Load a model once a process: its spec, network and padding id."""
    spec = read_spec(model)
    return spec, *load_backbone(spec, CPU)


def network_of(case: Case, model: Path):
    """The tiny model with dropout on; its weights are the same in every process."""
    kind = loss_of(case).kind
    spec, backbone, padding_id = loaded(str(model))
    backbone = deepcopy(backbone)
    if kind == TEXT:
        return RetroMAE(spec, backbone).train(), padding_id
    torch.manual_seed(3)
    network = BgeM3Network(spec, backbone) if case.loss == UNIFIED else VectorNetwork(spec, backbone)
    network = network if kind == EMBEDDING else PairScores(network)
    return (network.double() if case.double else network).train(), padding_id


def inputs_of(case: Case) -> Inputs:
    """Random tokens of mixed length, for all rows: queries and passages, pairs, or texts."""
    rng = np.random.default_rng(1)
    kind = loss_of(case).kind
    texts = ROWS * (1 if kind == TEXT else GROUP) + (ROWS if kind == EMBEDDING else 0)
    offsets = offsets_of(rng.integers(3, 20, texts))
    ids = rng.integers(5, 60, offsets[-1]).astype(np.int32)
    return Inputs(Tokens(ids, offsets, np.zeros(texts, dtype=bool)))


def keys_of(rank: Rank, device: torch.device) -> BatchKeys:
    """Keys with a duplicate of another row's positive among the negatives, and graded teacher scores."""
    rng = np.random.default_rng(2)
    passages = torch.arange(100, 100 + ROWS * GROUP).view(ROWS, GROUP).clone()
    passages[0, 1] = passages[5, 0]
    return BatchKeys(
        query_keys=torch.arange(ROWS, device=device),
        passage_keys=passages.to(device),
        positive_keys=passages[:, :1].to(device),
        teacher=torch.tensor(
            rng.integers(0, 3, (ROWS, GROUP)) / 2, device=device
        ),  # with ties, so that rows have different numbers of ordered pairs
        in_batch=True,
        first=rank.first_row,
        count=rank.row_count,
        world=rank.world,
        virtual_rank_rows=ROWS // VIRTUAL_RANKS,
    )


def local_inputs(inputs: Inputs, rank: Rank, kind: str) -> Inputs:
    """The texts of a rank's rows, in the order in which the loop tokenizes them."""
    rows = np.arange(rank.first_row, rank.first_row + rank.row_count)
    queries = ROWS if kind == EMBEDDING else 0
    group = 1 if kind == TEXT else GROUP
    passages = (queries + rows[:, None] * group + np.arange(group)).reshape(-1)
    order = np.concatenate([rows, passages]) if kind == EMBEDDING else passages
    tokens = inputs.tokens
    texts = [tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]] for i in order]
    offsets = offsets_of(np.array([len(text) for text in texts]))
    return Inputs(Tokens(np.concatenate(texts), offsets, tokens.truncated[order]))


def step_inputs_of(case: Case, rank: Rank, device: torch.device = CPU) -> StepInputs:
    return StepInputs(keys_of(rank, device), rank, local_inputs(inputs_of(case), rank, loss_of(case).kind), 7)


def gradients(network) -> torch.Tensor:
    """All gradients, concatenated."""
    weights = [weight.grad for _, weight in sorted(network.named_parameters())]
    return torch.cat([(w.full_tensor() if hasattr(w, "full_tensor") else w).flatten().double() for w in weights])


def plain(case: Case, model: Path) -> tuple[float, torch.Tensor]:
    """The reference: one backward pass through the graphs of all chunks, in one rank, without a gather."""
    network, padding_id = network_of(case, model)
    rank, loss = Rank(0, 1, case.virtual_ranks, ROWS), loss_of(case)
    batch, chunker = step_inputs_of(case, rank), Chunker(case.budget, CPU, padding_id)
    if loss.kind != EMBEDDING:
        group = GROUP if loss.kind == RERANKING else 1
        plans = chunker.plan(batch.inputs, batch.rows_by_virtual_rank(), group, batch.chunk_seed)
    else:
        plans = chunker.plan(batch.inputs, batch.texts_by_virtual_rank(), 1, batch.chunk_seed)
    chunks, chunk_outputs = [chunker.pack(batch.inputs, plan) for plan in plans], []
    for plan, (packed, _) in zip(plans, chunks, strict=True):
        torch.manual_seed(plan.seed)
        chunk_outputs.append(network(packed))
    positions = [np.concatenate([plan.documents for plan in plans])]
    positions += [np.concatenate([tokens for _, tokens in chunks])] * (len(chunk_outputs[0]) - 1)
    columns = zip(positions, zip(*chunk_outputs, strict=True), strict=True)
    outputs = [torch.cat(column)[torch.from_numpy(np.argsort(order))] for order, column in columns]
    if loss.kind != EMBEDDING:
        value = loss(Scores(batch.keys, outputs[0].view(ROWS, -1)))
    else:
        passages = outputs[0][ROWS:].unflatten(0, (ROWS, GROUP))
        tokens = token_outputs(batch, tuple(outputs[1:])) if case.loss == UNIFIED else None
        value = loss(Batch(batch.keys, outputs[0][:ROWS], passages, gather=lambda tensor: tensor, tokens=tokens))
    value.backward()
    return float(value), gradients(network)


def step_of(case: Case, model: Path, index: int, device: torch.device = CPU) -> dict:
    """Compute one step of rank `index`: the mean loss, the gradients, and counts of collective operations."""
    network, padding_id = network_of(case, model)
    network.to(device)
    rank, loss = Rank(index, case.world, case.virtual_ranks, ROWS), loss_of(case)
    counted = Counter()
    parallel = SingleProcess(network)
    if case.world > 1 and case.parallel == "ddp":
        parallel = DDPModel(network)
        parallel.ddp.register_comm_hook(counted, _counting_hook)
    elif case.world > 1:
        parallel = FSDPModel(network, CPU)
    make_step = GradCacheStep if loss.kind == EMBEDDING else AccumulatingStep
    make_step = partial(GradCacheStep, assemble=token_outputs) if case.loss == UNIFIED else make_step
    step = make_step(parallel, loss, Chunker(case.budget, device, padding_id))
    with _broken(case.broken), _counting(counted):
        value = step(step_inputs_of(case, rank, device))
    total = torch.tensor([float(value)], dtype=torch.float64)
    if case.world > 1:
        dist.all_reduce(total)
    return {"loss": float(total) / case.world, "gradients": gradients(network), "counted": dict(counted)}


def _counting_hook(counted: Counter, bucket):
    counted["gradient reductions"] += 1
    mean = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(mean, async_op=True).get_future().then(lambda done: done.value()[0])


@contextmanager
def _counting(counted: Counter):
    with ExitStack() as stack:
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            real = getattr(dist, name)

            def counting(*args, _real=real, _name=name, **kwargs):
                counted[_name] += 1
                return _real(*args, **kwargs)

            stack.enter_context(mock.patch.object(dist, name, counting))
        yield


def _gather_detached(rank: Rank, tensor: torch.Tensor) -> torch.Tensor:
    """A plain all-gather, in which the rows of other ranks have no gradient."""
    gathered = [torch.zeros_like(tensor) for _ in range(rank.world)]
    dist.all_gather(gathered, tensor.detach())
    gathered[rank.index] = tensor
    return torch.cat(gathered)


def _mean_without_world(keys: BatchKeys, values: torch.Tensor) -> torch.Tensor:
    return values.sum() / len(keys.query_keys)


@contextmanager
def _broken(mistake: str):
    patches = {
        "no replay": mock.patch.object(grad_cache, "seed_dropout"),
        "detached": mock.patch.object(Rank, "gather", _gather_detached),
        "no factor": mock.patch.object(BatchKeys, "global_mean", _mean_without_world),
    }
    with patches[mistake] if mistake else ExitStack():
        yield


def run(cases: Iterable[Case], folder: Path, model: Path) -> dict[str, dict]:
    """Compute the cases in four processes; returns the first rank's results by the case's name."""
    cases = sorted(cases, key=lambda case: case.world)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    command = [sys.executable, "-m", "tests.support.ranks", str(folder), str(model)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, timeout=300, check=True)
    return torch.load(folder / "results.pt")


def main(folder: Path, model: Path) -> None:
    """Fork the ranks, which find everything imported and the model loaded. A rank that fails ends the others, which would wait."""
    torch.set_num_threads(1)
    loaded(str(model))
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=compute, args=(folder, model, rank)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    running = set(ranks)
    while running and not any(rank.exitcode for rank in ranks):
        multiprocessing.connection.wait([rank.sentinel for rank in running])
        running = {rank for rank in running if rank.exitcode is None}
    for rank in running:
        rank.kill()
    sys.exit(bool(running) or any(rank.exitcode for rank in ranks))


def compute(folder: Path, model: Path, rank: int) -> None:
    """Compute the cases of one rank, the smallest world first; the first rank saves the results."""
    cases = [Case(**each) for each in json.loads((folder / "cases.json").read_text())]
    results = {}
    for world in sorted({case.world for case in cases}):
        if rank >= world:
            continue
        if world > 1:
            store = dist.FileStore(str(folder / f"store-{world}"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        for case in cases:
            if case.world == world:
                results[case.name] = step_of(case, model, rank)
        if world > 1:
            dist.barrier()  # a rank that exits first would close its connections to the others
            dist.destroy_process_group()
    if rank == 0:
        torch.save(results, folder / "results.pt")
    os._exit(0)  # gloo's threads sometimes abort the interpreter's shutdown with SIGABRT, after all work is done


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
