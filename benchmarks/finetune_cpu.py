"""A fine-tuning step on this machine's cores beside sentence-transformers' CachedMultipleNegativesRankingLoss, in one run.

    python benchmarks/finetune_cpu.py --report benchmarks/finetune_cpu.md

Same weights, texts, batch, temperature, dropout and optimizer; tokenising, clipping and AdamW are inside the clock on both
sides. The contenders take turns in one process, on one batch a round, and every ratio is taken inside a round. The peer
runs with the mini-batches that were fastest for it in trials on a batch of their own. Before that, without dropout, losses
and gradients must agree. Memory is of processes of their own: the same step at a global batch and at eight times as many.
"""

import gc
import json
import os
import resource
import shlex
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.demo import minilm
from benchmarks.finetune_contenders import (
    CLOSE,
    HEAPS,
    OPTIMIZATION,
    SCALE,
    Peer,
    Shoal,
    agreement,
    batches,
    tokens_of,
    trainer,
)
from benchmarks.process import run_python
from benchmarks.reporting import machine, spread, verdict
from lib.engine.cluster import ENVIRONMENT
from lib.engine.malloc import return_large_blocks
from lib.training.job import CPU_BUDGET

VARIANTS = {"pairs": 1, "one hard negative": 2}  # passages a query
BAR, MOST_GROWTH, STEPS = 1.25, 0.10, 2
NOTES = f"""
samples: queries, each with its passages. Ratios are taken inside each round; median (least - most). Both sides: texts to
tokens, loss and gradients, the norm of all gradients cut to {OPTIMIZATION.clip:g}, AdamW; float32; dropout of the model's
configuration; scale {SCALE:g}. sentence-transformers tokenises by its own data collator, in arrival order, as its Trainer does."""
MEMORY_NOTES = f"""
Peak resident memory while {STEPS} steps are done, the reading of the model left out; each a process of its own. What grows
with the batch by design: tokens, vectors and their gradients (4 bytes x dimensions x texts, a few times)."""


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
