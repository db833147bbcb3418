"""A training step on one CUDA device beside sentence-transformers' CachedMultipleNegativesRankingLoss, and its memory.

    python benchmarks/finetune_gpu.py --report benchmarks/finetune_gpu.md

BERT-base's shape with random weights, which are as fast; texts of mixed length; bfloat16 autocast and the configuration's
dropout on both sides; tokenising, clipping and AdamW inside the clock. Without dropout, in float32, both must agree first.
"""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

import click
import pyarrow as pa
import torch
import transformers

from benchmarks.embed_gpu import Size, machine, matmul_rate, peak_memory
from benchmarks.exact_lengths import corpora
from benchmarks.finetune_contenders import Contender, Peer, Shoal, agreement, tokens_of, trainer, unlike
from benchmarks.networks import SHAPES, build
from benchmarks.reporting import spread
from lib.models.spec import flops_per_token
from lib.models.spec_reader import read_spec
from lib.training.job import CUDA_BUDGET

ROUNDS, PASSES = 4, 3  # passes: a backward counts as two forwards; the forward that is done twice counts once


def autocast() -> AbstractContextManager:
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)


def seconds_of(contender: Contender, tables: list[pa.Table]) -> list[float]:
    """Of a step on each table but the first, which is for warming up."""
    step = trainer(contender)
    return [step(table, number) for number, table in enumerate(tables)][1:]


def lines(folder: Path, small: bool, device: torch.device) -> Iterator[str]:
    size = Size() if not small else Size(matmul=256)
    rows, most = (16, 64) if small else (1024, 8192)
    budgets = (256,) if small else (8192, CUDA_BUDGET, 32_768, 65_536)
    mini = [("mini_batch_size", count) for count in ((8,) if small else (128, 512))]
    mini += [("mini_batch_num_tokens", count) for count in ((256,) if small else (16_384, 65_536))]
    model = build(SHAPES[0], folder, small, device)
    spec = read_spec(str(model))
    texts = corpora(model, spec, 64, (2 * most + 2 * (ROUNDS + 1) * rows + 1000) * 45)[0].texts
    tables = unlike(texts, ROUNDS + 1, rows, 1)
    peak = matmul_rate(size.matmul, size.matmul, size.matmul, device)
    yield from ("# Fine-tuning on one device", "", f"- `python benchmarks/finetune_gpu.py{' --small' * small}`")
    yield from machine(size, peak, device)
    lengths = [tokens_of(table, str(model)) for table in tables[1:]]
    tokens = sum(map(sum, lengths)) / ROUNDS
    yield f"- {SHAPES[0].name}, {rows:,} pairs a step, {tokens:,.0f} tokens in the mean, {ROUNDS} steps each"
    few = tables[0].slice(0, min(rows, 128))
    off = agreement(Shoal(str(model), budgets[0], device), Peer(str(model), device), few)
    yield f"- float32 without dropout: losses {off[0]:.1e} apart, gradients {off[1]:.1e} of their norm"
    yield from ("", "| | s a step | pairs/s | tokens/s | of the matmul peak | GiB |", "|---|---|---|---|---|---|")
    flops = PASSES * sum(flops_per_token(spec, int(n)) * int(n) for one in lengths for n in one) / ROUNDS

    def line(name: str, contender: Contender) -> str:
        with peak_memory(device) as held:
            took = seconds_of(contender, tables)
        cells = [spread(took, "{:.3f}"), f"{rows / median(took):,.0f}", f"{tokens / median(took):,.0f}"]
        return f"| {' | '.join([name, *cells, f'{flops / median(took) / peak:.0%}', f'{held[0]:.1f}'])} |"

    for budget in budgets:
        yield line(f"shoal, {budget:,} tokens a chunk", Shoal(str(model), budget, device, autocast))
    peer = Peer(str(model), device, autocast)
    for setting in mini:
        peer.use(setting)
        name = "sentence-transformers, {}={:,}".format(*setting)
        try:
            said = line(name, peer)
        except torch.OutOfMemoryError:
            said = f"| {name} | out of memory | | | | |"
        yield said
    del peer
    yield from ("", "| pairs a step | GiB at most |", "|---|---|")
    yield from memory(str(model), budgets[0], (most // 8, most), texts, device)


def memory(model: str, budget: int, counts: tuple[int, int], texts: list[str], device: torch.device) -> Iterator[str]:
    """The most that is allocated in a step of few and of many pairs, weights and the optimizer's states with it."""
    shoal, held = Shoal(model, budget, device, autocast), []
    step = trainer(shoal)
    for count in counts:
        (table,) = unlike(texts, 1, count, 1)
        step(table, 0)
        with peak_memory(device) as most:
            step(table, 1)
        held.append(most[0])
        yield f"| {count:,} | {most[0]:.3f} |"
    if held[0]:
        yield f"\nGrowth at {counts[1] / counts[0]:g} times the batch: {held[1] / held[0] - 1:.1%}."


@click.command()
@click.option("--small", is_flag=True, help="The same code with tiny sizes on the CPU.")
@click.option("--report", type=click.Path(dir_okay=False), help="Also write the report here.")
def main(small: bool, report: str | None) -> None:
    """Measure a training step on one CUDA device beside its peer."""
    if not small and not torch.cuda.is_available():
        raise click.ClickException("no CUDA device is here. Run this on a machine with one, or try it with --small")
    transformers.utils.logging.disable_progress_bar()
    said = []
    with tempfile.TemporaryDirectory(prefix="finetune_gpu_") as folder:
        for line in lines(Path(folder), small, torch.device("cpu" if small else "cuda")):
            said.append(line)
            click.echo(line)
    if report:
        Path(report).write_text("\n".join(said) + "\n")


if __name__ == "__main__":
    main()
