"""A fine-tuning step on this machine's cores beside sentence-transformers' CachedMultipleNegativesRankingLoss, in one run.

    python benchmarks/finetune_cpu.py --report benchmarks/finetune_cpu.md

Same weights, texts, batch, temperature, dropout and optimizer; tokenising, clipping and AdamW are inside the clock on both
sides. The contenders take turns in one process, on one batch a round, and every ratio is taken inside a round. The peer
runs with the mini-batches that were fastest for it in trials on a batch of their own. Before that, without dropout, losses
and gradients must agree. Memory is of processes of their own: the same step at a global batch and at eight times as many.
"""

import ctypes
import gc
import json
import os
import resource
import shlex
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from benchmarks.corpora import mixed_lengths
from benchmarks.demo import minilm
from benchmarks.process import run_python
from benchmarks.reporting import machine, spread, verdict
from lib.engine.cluster import ENVIRONMENT
from lib.engine.malloc import M_MMAP_THRESHOLD, return_large_blocks
from lib.models.spec_reader import read_spec
from lib.training.data.batches import BATCHES
from lib.training.data.pairs import text_keys
from lib.training.job import CPU_BUDGET
from lib.training.loop import RankBatch
from lib.training.losses.infonce import InfoNCE
from lib.training.models.embedder import EmbedderTrainable
from lib.training.step.chunks import Chunker
from lib.training.step.collectives import Rank
from lib.training.step.grad_cache import Autocast
from lib.training.step.optimizer import Optimization
from lib.training.step.parallel import SingleProcess

VARIANTS = {"pairs": 1, "one hard negative": 2}  # passages a query
TOKENS = 3, 256  # of a text
SCALE = 20.0  # of the cosine: 1 / temperature
OPTIMIZATION = Optimization(learning_rate=2e-5)
CPU = torch.device("cpu")
BAR, CLOSE, MOST_GROWTH, STEPS = 1.25, 1e-4, 0.10, 2
NOTES = f"""
samples: queries, each with its passages. Ratios are taken inside each round; median (least - most). Both sides: texts to
tokens, loss and gradients, the norm of all gradients cut to {OPTIMIZATION.clip:g}, AdamW; float32; dropout of the model's
configuration; scale {SCALE:g}. sentence-transformers tokenises by its own data collator, in arrival order, as its Trainer does."""
MEMORY_NOTES = f"""
Peak resident memory while {STEPS} steps are done, the reading of the model left out; each a process of its own. What grows
with the batch by design: tokens, vectors and their gradients (4 bytes x dimensions x texts, a few times)."""


class Contender(Protocol):
    network: nn.Module

    def gradients(self, batch: pa.Table, seed: int) -> float:
        """From texts to gradients, which are left in the weights; returns the loss."""
        ...

    def weights(self) -> dict[str, nn.Parameter]:
        """By their names in the transformers network."""
        ...

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """No gradients, before a step."""
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
    """As glibc has it by itself after some blocks of 32 MiB: what the peer runs with."""
    m_trim_threshold = -1
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    library.mallopt(m_trim_threshold, 64 << 20)


HEAPS = {"shoal": return_large_blocks, "sentence-transformers": great_blocks_together}


def _column(inputs: dict[str, Any], prefix: str, device: torch.device) -> dict[str, Any]:
    """What the Trainer's collect_features takes of the collator's batch for one column."""
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


def compete(name: str, sizes: tuple[int, int, int], settings: list[tuple[str, int]]) -> dict[str, Any]:
    """One variant: agreement, the peer's trials, then rounds of both. sizes: rows, rounds, our token budget."""
    rows, rounds, budget = sizes
    model, group = minilm(), VARIANTS[name]
    shoal, peer = Shoal(model, budget), Peer(model)
    first, *rest = batches(1 + rounds, rows, group, seed=group)
    off = agreement(shoal, peer, first)
    click.echo(f"{name}: losses apart by {off[0]:.1e}, gradients by {off[1]:.1e}", err=True)
    steps = {"shoal": trainer(shoal), "sentence-transformers": trainer(peer)}
    tried = {}
    for setting in settings:
        peer.use(setting)
        tried[setting] = steps["sentence-transformers"](first, 0)
        click.echo(f"  trial {setting[0]}={setting[1]:<6} {tried[setting]:.2f} s", err=True)
    best = min(tried, key=tried.__getitem__)
    peer.use(best)
    seconds: dict[str, list[float]] = {contender: [] for contender in steps}
    return_large_blocks()
    steps["shoal"](first, 0)
    for number, batch in enumerate(rest):
        order = list(steps) if number % 2 else list(steps)[::-1]
        for contender in order:
            HEAPS[contender]()
            seconds[contender].append(steps[contender](batch, number))
        said = "  ".join(f"{contender} {took[-1]:.2f} s" for contender, took in seconds.items())
        click.echo(f"  round {number + 1}/{rounds}  {said}", err=True)
    lengths = np.concatenate([tokens_of(batch, model) for batch in rest])
    return {
        "off": off,
        "tried": tried,
        "best": best,
        "seconds": seconds,
        "lengths": lengths,
        "texts": rows * (1 + group),
    }


def play(folder: Path, budget: int) -> None:
    """Do the steps on the batches in a folder; write the bytes after loading, and the most while the steps were done."""
    tables = [pq.read_table(file) for file in sorted(folder.glob("batch-*.parquet"))]
    shoal = Shoal(minilm(), budget)
    step = trainer(shoal)
    return_large_blocks()
    gc.collect()
    loaded = _resident("VmRSS")
    _forget_peak()
    for seed, table in enumerate(tables):
        step(table, seed)
    (folder / "told.json").write_text(json.dumps({"loaded": loaded, "peak": _resident("VmHWM")}))


def _forget_peak() -> None:
    """Linux counts the peak anew from here; elsewhere it is that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        click.echo("the peak of memory cannot be counted anew here: it is that of the whole process", err=True)


def _resident(name: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def memory(rows: tuple[int, ...], budget: int, rounds: int) -> dict[int, list[dict[str, int]]]:
    """By global batch: bytes of each round's process."""
    told: dict[int, list[dict[str, int]]] = {count: [] for count in rows}
    with tempfile.TemporaryDirectory(prefix="shoal-finetune-") as temporary:
        for count in rows:
            folder = Path(temporary) / str(count)
            folder.mkdir()
            for number, table in enumerate(batches(STEPS, count, 1, seed=1)):
                pq.write_table(table, folder / f"batch-{number}.parquet")
        for _ in range(rounds):
            for count in rows:
                folder = Path(temporary) / str(count)
                line = ["-m", "benchmarks.finetune_cpu", "--token-budget", str(budget), "--play", str(folder)]
                run_python(f"batch {count}", line)
                told[count].append(json.loads((folder / "told.json").read_text()))
                click.echo(f"  batch {count:<6} {told[count][-1]['peak'] / 2**20:,.0f} MiB", err=True)
    return told


def speed_report(found: dict[str, dict[str, Any]], rows: int, budget: int) -> list[str]:
    lines = [f"## Speed: a global batch of {rows:,} queries", ""]
    lines += ["| variant | contender | s a step | samples/s | tokens/s |", "|---|---|---|---|---|"]
    bars = ["", "| bar | asked | median (least - most) | |", "|---|---|---|---|"]
    notes = []
    for name, one in found.items():
        best = "{}={}".format(*one["best"])
        tokens = one["lengths"].sum() / len(one["seconds"]["shoal"])
        labels = {
            "shoal": f"shoal, {budget:,} tokens a chunk",
            "sentence-transformers": f"sentence-transformers, {best}",
        }
        for contender, took in one["seconds"].items():
            cells = [name, labels[contender], spread(took), spread([rows / each for each in took], "{:.1f}")]
            lines.append(f"| {' | '.join(cells)} | {tokens / median(took):,.0f} |")
        ratios = [b / a for a, b in zip(*one["seconds"].values(), strict=True)]
        bars.append(
            f"| {name}: samples/s over theirs | >= {BAR} | {spread(ratios)} | {verdict(median(ratios) >= BAR)} |"
        )
        spots = ", ".join(f"p{spot} {np.percentile(one['lengths'], spot):.0f}" for spot in (0, 10, 50, 90, 100))
        tried = ", ".join(f"{setting}={value} {took:.2f}" for (setting, value), took in one["tried"].items())
        notes.append(
            f"- {name}: {one['texts']:,} texts a step, mean {one['lengths'].mean():.1f} tokens, {spots}. Without dropout "
            f"losses are {one['off'][0]:.1e} apart, gradients {one['off'][1]:.1e} of their norm (at most {CLOSE:g}). "
            f"Trials of sentence-transformers, seconds: {tried}"
        )
    return [*lines, *bars, NOTES, "", *notes]


def growth_of(told: dict[int, list[dict[str, int]]]) -> float:
    """Of the median peak, from the smallest batch to the greatest."""
    peaks = [median(one["peak"] for one in told[rows]) for rows in (min(told), max(told))]
    return peaks[1] / peaks[0] - 1


def memory_report(told: dict[int, list[dict[str, int]]]) -> list[str]:
    lines = ["", "## Memory", "", "| global batch | MiB after loading | MiB at most, in the steps |", "|---|---|---|"]
    for rows, runs in told.items():
        cells = [spread([one[name] / 2**20 for one in runs], "{:,.0f}") for name in ("loaded", "peak")]
        lines.append(f"| {rows:,} | {' | '.join(cells)} |")
    growth, more = growth_of(told), max(told) / min(told)
    lines += ["", "| bar | asked | measured | |", "|---|---|---|---|"]
    lines.append(
        f"| growth at {more:g} x the batch | < {MOST_GROWTH:.0%} | {growth:.1%} | {verdict(growth < MOST_GROWTH)} |"
    )
    return [*lines, MEMORY_NOTES]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(",") if word)


@click.command()
@click.option("--batch", default=256, show_default=True, help="Queries a step.")
@click.option("--rounds", default=5, show_default=True, help="Steps of every contender.")
@click.option("--variants", default=",".join(VARIANTS), show_default=True, help="By commas.")
@click.option("--token-budget", default=CPU_BUDGET, show_default=True, help="Our tokens a chunk.")
@click.option("--mini-batches", default="8,16,32,64", show_default=True, help="Texts a mini-batch that the peer tries.")
@click.option("--mini-tokens", default="512,1024,2048,4096", show_default=True, help="Tokens a mini-batch, likewise.")
@click.option("--memory-batches", default="256,2048", show_default=True, help="Queries a step; empty: no memory.")
@click.option("--memory-rounds", default=3, show_default=True, help="Processes of every batch.")
@click.option("--report", "path", type=click.Path(dir_okay=False), help="Also write the report here.")
@click.option("--play", "part", hidden=True)
def main(part: str | None, path: str | None, **options: Any) -> None:
    """Measure a step beside its peer, and its memory, and print the report."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    budget, rows = options["token_budget"], options["batch"]
    if part:
        return play(Path(part), budget)
    load = os.getloadavg()
    settings = [("mini_batch_size", count) for count in _numbers(options["mini_batches"])]
    settings += [("mini_batch_num_tokens", count) for count in _numbers(options["mini_tokens"])]
    names = [name for name in options["variants"].split(",") if name]
    found = {name: compete(name, (rows, options["rounds"], budget), settings) for name in names}
    given = [param.name or "" for param in click.get_current_context().command.params if param.name in options]
    said = " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(options[name]))}" for name in given)
    cores = len(os.sched_getaffinity(0))
    lines = [f"# Fine-tuning on {cores} cores", "", f"- `python benchmarks/finetune_cpu.py {said}`, all-MiniLM-L6-v2"]
    lines += [*machine(load), ""]
    if found:
        lines += speed_report(found, rows, budget)
    told: dict[int, list[dict[str, int]]] = {}
    if options["memory_batches"]:
        os.environ.update(ENVIRONMENT)  # as workers have it
        told = memory(_numbers(options["memory_batches"]), budget, options["memory_rounds"])
        lines += memory_report(told)
    text = "\n".join(lines) + "\n"
    click.echo(text)
    if path:
        Path(path).write_text(text)
    if told and not growth_of(told) < MOST_GROWTH:
        raise click.ClickException(f"memory grew by {growth_of(told):.1%}")


if __name__ == "__main__":
    main()
