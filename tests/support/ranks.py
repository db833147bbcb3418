"""Gradients of a training step in several processes: `run(cases, folder)` starts four ranks, which do every case.

A case is one step on a tiny model at a world size of 1, 2 or 4. The first rank keeps its loss, its gradients and how many
collectives it took; `plain` gives what one big batch without chunks or ranks gives.
"""

import json
import os
import subprocess
import sys
import time
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
from lib.training.models.retromae import TextNetwork
from lib.training.models.retromae_model import RetroMAE
from lib.training.step import grad_cache as step_module
from lib.training.step.chunks import Chunker
from lib.training.step.collectives import Rank
from lib.training.step.grad_cache import AccumulatingStep, GradCacheStep, StepInputs
from lib.training.step.parallel import DDPModel, FSDPModel, SingleProcess, layers_of
from lib.training.step.trainable import Inputs

ROWS, GROUP, SLICES = 8, 3, 4
UNIFIED = "m3-unified"
CPU = torch.device("cpu")


token_outputs = partial(token_outputs_of, (0, 2, 3))


@dataclass(frozen=True)
class Case:
    """loss: as losses.parse reads it, "matryoshka" for InfoNCE at two sizes. budget: tokens a chunk. broken: a mistake."""

    loss: str
    world: int = 1
    parallel: str = "ddp"
    budget: int = 40
    double: bool = True
    broken: str = ""
    slices: int = SLICES

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values()).replace(":", "_")


def loss_of(case: Case):
    if case.loss == "matryoshka":
        return Matryoshka(losses.parse(("infonce:temperature=0.05",)), (8, 32), (0.5, 0.5))
    return losses.parse((case.loss,))


class PairScores(torch.nn.Module):
    """A reranker as small as can be: a linear score of the pooled vector."""

    def __init__(self, network: VectorNetwork) -> None:
        super().__init__()
        self.vectors = network
        self.score = torch.nn.Linear(32, 1)

    def forward(self, batch):
        return (self.score(self.vectors(batch)[0]).squeeze(1),)


@cache
def loaded(model: str):
    """The model's spec, its network and what positions need; once a process."""
    spec = read_spec(model)
    return spec, *load_backbone(spec, CPU)


def network_of(case: Case, model: Path):
    """The tiny model, the same weights in every process, with dropout on."""
    of = loss_of(case).of
    spec, backbone, padding_id = loaded(str(model))
    if of == TEXT:
        network = TextNetwork(RetroMAE(spec, device=CPU))
        return network.train(), network.retromae.padding_id
    backbone = deepcopy(backbone)
    torch.manual_seed(3)
    network = BgeM3Network(spec, backbone) if case.loss == UNIFIED else VectorNetwork(spec, backbone)
    network = network if of == EMBEDDING else PairScores(network)
    return (network.double() if case.double else network).train(), padding_id


def inputs_of(case: Case) -> Inputs:
    """Random tokens of mixed length: queries and passages, or pairs, of all rows."""
    rng = np.random.default_rng(1)
    texts = ROWS * (1 if loss_of(case).of == TEXT else GROUP) + (ROWS if loss_of(case).of == EMBEDDING else 0)
    offsets = offsets_of(rng.integers(3, 20, texts))
    ids = rng.integers(5, 60, offsets[-1]).astype(np.int32)
    return Inputs(Tokens(ids, offsets, np.zeros(texts, dtype=bool)))


def rows_of(world: int, first: int, count: int, device: torch.device) -> BatchKeys:
    """A duplicate of another row's positive among the negatives, and graded teacher scores."""
    rng = np.random.default_rng(2)
    passages = torch.arange(100, 100 + ROWS * GROUP).view(ROWS, GROUP).clone()
    passages[0, 1] = passages[5, 0]
    return BatchKeys(
        query_keys=torch.arange(ROWS, device=device),
        passage_keys=passages.to(device),
        positive_keys=passages[:, :1].to(device),
        teacher=torch.tensor(rng.integers(0, 3, (ROWS, GROUP)) / 2, device=device),  # ties: rows differ in their pairs
        in_batch=True,
        first=first,
        count=count,
        world=world,
        slice_rows=ROWS // SLICES,
    )


def local(inputs: Inputs, place: Rank, of: str) -> Inputs:
    """The texts of a rank's rows, as the loop tokenises them."""
    rows = np.arange(place.first, place.first + place.counts()[place.rank])
    shift = ROWS if of == EMBEDDING else 0
    group = 1 if of == TEXT else GROUP
    passages = (shift + rows[:, None] * group + np.arange(group)).reshape(-1)
    order = np.concatenate([rows, passages]) if of == EMBEDDING else passages
    tokens = inputs.tokens
    pieces = [tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]] for i in order]
    return Inputs(
        Tokens(np.concatenate(pieces), offsets_of(np.array([len(p) for p in pieces])), tokens.truncated[order])
    )


def work_of(case: Case, place: Rank, device: torch.device = CPU) -> StepInputs:
    rows = rows_of(place.world, place.first, place.counts()[place.rank], device)
    return StepInputs(rows, place, local(inputs_of(case), place, loss_of(case).of), 7)


def gradients(network) -> torch.Tensor:
    """All of them in one row."""
    weights = [weight.grad for _, weight in sorted(network.named_parameters())]
    return torch.cat([(w.full_tensor() if hasattr(w, "full_tensor") else w).flatten().double() for w in weights])


def plain(case: Case, model: Path) -> tuple[float, torch.Tensor]:
    """One backward over everything at once: every chunk's graph is kept, there is one rank, and nothing is gathered."""
    network, padding_id = network_of(case, model)
    place, loss = Rank(0, 1, case.slices, ROWS), loss_of(case)
    work, cutter = work_of(case, place), Chunker(case.budget, CPU, padding_id)
    if loss.of != EMBEDDING:
        group = GROUP if loss.of == RERANKING else 1
        cuts = cutter.by_row(work.inputs, work.slices(), group, work.chunk_seed)
    else:
        cuts = cutter.by_text(work.inputs, step_module._texts(work), work.chunk_seed)
    chunks, found = [cutter.chunk(work.inputs, cut) for cut in cuts], []
    for chunk in chunks:
        torch.manual_seed(chunk.seed)
        found.append(network(chunk.flat))
    kinds = [np.concatenate([chunk.documents for chunk in chunks])]
    kinds += [np.concatenate([chunk.tokens for chunk in chunks])] * (len(found[0]) - 1)
    columns = zip(kinds, zip(*found, strict=True), strict=True)
    outputs = [torch.cat(column)[torch.from_numpy(np.argsort(kind))] for kind, column in columns]
    if loss.of != EMBEDDING:
        value = loss(Scores(work.rows, outputs[0].view(ROWS, -1)))
    else:
        passages = outputs[0][ROWS:].unflatten(0, (ROWS, GROUP))
        tokens = token_outputs(work, tuple(outputs[1:])) if case.loss == UNIFIED else None
        value = loss(Batch(work.rows, outputs[0][:ROWS], passages, gather=lambda tensor: tensor, tokens=tokens))
    value.backward()
    return float(value), gradients(network)


def step_of(case: Case, model: Path, rank: int, device: torch.device = CPU) -> dict:
    """One step of this rank."""
    network, padding_id = network_of(case, model)
    network.to(device)
    place, loss = Rank(rank, case.world, case.slices, ROWS), loss_of(case)
    counted = Counter()
    wrapped = SingleProcess(network)
    if case.world > 1 and case.parallel == "ddp":
        wrapped = DDPModel(network)
        wrapped.ddp.register_comm_hook(counted, _counting_hook)
    elif case.world > 1:
        wrapped = FSDPModel(network, layers_of(network), CPU)
    kind = GradCacheStep if loss.of == EMBEDDING else AccumulatingStep
    kind = partial(GradCacheStep, assemble=token_outputs) if case.loss == UNIFIED else kind
    step = kind(wrapped, loss, Chunker(case.budget, device, padding_id))
    with _broken(case.broken), _counting(counted):
        value = step(work_of(case, place, device))
    shares = torch.tensor([float(value)], dtype=torch.float64)
    if case.world > 1:
        dist.all_reduce(shares)
    return {"loss": float(shares) / case.world, "gradients": gradients(network), "counted": dict(counted)}


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


def _detached(place: Rank, tensor: torch.Tensor) -> torch.Tensor:
    """What a plain all-gather gives: others' rows without a gradient."""
    everywhere = [torch.zeros_like(tensor) for _ in range(place.world)]
    dist.all_gather(everywhere, tensor.detach())
    everywhere[place.rank] = tensor
    return torch.cat(everywhere)


@contextmanager
def _broken(mistake: str):
    patches = {
        "no replay": mock.patch.object(step_module, "seed_dropout"),
        "detached": mock.patch.object(Rank, "gather", _detached),
        "no factor": mock.patch.object(BatchKeys, "mean", lambda rows, values: values.sum() / len(rows.query_keys)),
    }
    with patches[mistake] if mistake else ExitStack():
        yield


def run(cases: Iterable[Case], folder: Path, model: Path) -> dict[str, dict]:
    """Do the cases in four processes; what the first rank has of each, by the case's name."""
    cases = sorted(cases, key=lambda case: case.world)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.support.ranks", str(folder), str(model)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(4)]
    deadline = time.monotonic() + 300
    while any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
        if any(rank.poll() for rank in ranks) or time.monotonic() > deadline:  # the others would wait for it
            for rank in ranks:
                rank.kill()
    assert [rank.wait() for rank in ranks] == [0] * 4
    return torch.load(folder / "found.pt")


def main(folder: Path, model: Path, rank: int) -> None:
    torch.set_num_threads(1)
    cases = [Case(**each) for each in json.loads((folder / "cases.json").read_text())]
    found = {}
    for world in sorted({case.world for case in cases}):
        if rank >= world:
            continue
        if world > 1:
            store = dist.FileStore(str(folder / f"store-{world}"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        for case in cases:
            if case.world == world:
                found[case.name] = step_of(case, model, rank)
        if world > 1:
            dist.barrier()  # whoever leaves first would take its end of a connection along
            dist.destroy_process_group()
    if rank == 0:
        torch.save(found, folder / "found.pt")
    os._exit(0)  # threads of gloo that the interpreter finds at its end have ended it with SIGABRT, all work done


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
