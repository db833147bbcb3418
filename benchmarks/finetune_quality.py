"""What fine-tuning does to MiniLM on wn-8k, by our own jobs: in-batch negatives, mined ones, filtered ones, distillation.

    python benchmarks/finetune_quality.py --only base
    python benchmarks/finetune_quality.py --only in-batch --seeds 0
    ...                                   # or everything there is at once, without --only
    python benchmarks/finetune_quality.py --only none --report benchmarks/finetune_quality.md

in-batch   InfoNCE; the passages of the other rows are the negatives
hard       and negatives from those that the base model ranks 2 to 30 for the query, its own positives left out
filtered   the same, but none whose cosine is over 0.95 x that of the query's positive; the next in rank take their places
distilled  the filtered negatives with a teacher's scores, and their softmax learned beside InfoNCE (`kl`)
teacher    a cross-encoder that jobs/finetune_model.py trains once on the filtered negatives (`listwise`), and what it
           makes of the base model's first passages

Training and mining see the queries of qrels/train.tsv alone; evaluation is of the held-out ones. Every run is a row of
results.json in --folder: what is there is not done again, and a run that was stopped goes on.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import click

from benchmarks.demo import minilm
from benchmarks.finetune_mining import Row
from benchmarks.finetune_quality_runs import Bench, base, key_of, student, teacher_alone, teacher_key
from benchmarks.process import ROOT
from benchmarks.reporting import machine, verdict

VARIANTS = ("in-batch", "hard", "filtered", "distilled")
PARTS = ("base", *VARIANTS, "teacher")
BASE, GAIN, MOST_SECONDS = 0.3511, 0.0315, 300.0

NOTES = """Differences are of equal seeds.
CPU s: user and system of the process that trains, from its start to its end, loading and export included; of steps: the
clock of the steps alone, times the threads."""


def spread(values: Sequence[float], form: str = "{:.4f}") -> str:
    """Mean (least - most)."""
    return "{} ({} - {})".format(*(form.format(value) for value in (mean(values), min(values), max(values))))


def compose(bench: Bench, seeds: Sequence[int], head: list[str]) -> str:
    results = bench.results
    runs = {
        variant: {seed: results[key] for seed in seeds if (key := key_of(bench, variant, seed)) in results}
        for variant in VARIANTS
    }
    start = results["base"]["ndcg_at_10"] if "base" in results else BASE
    lines = [*head, "", f"Before training: NDCG@10 {start:.4f}. Mean (least - most) of the seeds. {NOTES}", ""]
    lines += ["| variant | runs | NDCG@10 | over the base | over in-batch | steps | CPU s | CPU s of steps |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for variant, done in runs.items():
        if done:
            lines.append(f"| {variant} | {len(done)} | {' | '.join(_cells(done, runs['in-batch'], start))} |")
    return "\n".join([*lines, *_bars(runs["in-batch"], start), *_costs(bench), *_commands(runs)]) + "\n"


def _cells(done: dict[int, Row], plain: dict[int, Row], start: float) -> list[str]:
    values = {seed: row["ndcg_at_10"] for seed, row in done.items()}
    over = [value - plain[seed]["ndcg_at_10"] for seed, value in values.items() if seed in plain]
    gains = [value - start for value in values.values()]
    steps = {row["steps"] for row in done.values()}
    cells = [spread(list(values.values())), spread(gains, "{:+.4f}"), spread(over, "{:+.4f}") if over else ""]
    cells += [" ".join(map(str, sorted(steps))), spread([row["cpu"] for row in done.values()], "{:.0f}")]
    return [*cells, spread([row["clock"] * row["threads"] for row in done.values()], "{:.0f}")]


def _bars(done: dict[int, Row], start: float) -> list[str]:
    if not done:
        return []
    gain, most = mean(row["ndcg_at_10"] for row in done.values()) - start, max(row["cpu"] for row in done.values())
    lines = ["", "| bar | asked | measured | |", "|---|---|---|---|"]
    lines.append(f"| in-batch over the base, mean | >= {GAIN} | {gain:.4f} | {verdict(gain >= GAIN)} |")
    lines.append(f"| in-batch, CPU s at most | <= {MOST_SECONDS:.0f} | {most:.0f} | {verdict(most <= MOST_SECONDS)} |")
    return lines


def _costs(bench: Bench) -> list[str]:
    """What comes before the training of a variant."""
    results, key, top = bench.results, teacher_key(bench), bench.options["rerank_top"]
    lines = ["", "What comes before:", ""]
    if (row := results.get(bench.mining)) is not None:
        counts = "; ".join(f"{name} {value:,}" for name, value in row.items() if name != "seconds")
        lines.append(f"- mining, for `hard` and all below it: {row['seconds']:.0f} s by the clock; {counts}")
    if (row := results.get(f"teacher/{key}")) is not None:
        said = f"{row['steps']} steps, {row['cpu']:.0f} CPU s"
        lines.append(f"- the teacher, for `distilled`: {said}: `python jobs/finetune_model.py {row['command']}`")
    if (row := results.get(f"scores/{key}")) is not None:
        lines.append(
            f"- its scores, in {row['dtype']}: {row['pairs']:,} pairs, {row['seconds']:.0f} s by the clock; it puts a "
            f"positive first in {row['positive first']:.1%} of the rows that it learned from"
        )
    if (row := results.get(f"teacher-top-{top}/{key}")) is not None:
        lines.append(f"- it makes NDCG@10 {row['ndcg_at_10']:.4f} of the base model's first {top} passages")
    return lines


def _commands(runs: dict[str, dict[int, Row]]) -> list[str]:
    lines = ["", "Commands, of the first seed each:", ""]
    return lines + [
        f"    python jobs/finetune_model.py {next(iter(done.values()))['command']}" for done in runs.values() if done
    ]


@click.command()
@click.option("--folder", default=".tasks/finetune-quality", show_default=True, help="Data, runs and results.json.")
@click.option("--only", default=",".join(PARTS), show_default=True, help="What to do, by commas, or none.")
@click.option("--seeds", default="0,1,2", show_default=True, help="By commas.")
@click.option("--rows", type=int, help="Training queries, the first of them. Default: all.")
@click.option("--batch", default=128, show_default=True)
@click.option("--group", default=2, show_default=True, help="Passages a query where there are negatives.")
@click.option("--epochs", default=2, show_default=True, help="Passes that the steps are taken of.")
@click.option("--max-steps", default=75, show_default=True, help="95 of 128 rows are an epoch.")
@click.option("--negative-steps", type=int, help="Steps where there are negatives. Default: --max-steps.")
@click.option("--dtype", default="auto", show_default=True, help="Of training and its evaluation: auto is float32.")
@click.option("--learning-rate", default=5e-5, show_default=True)
@click.option("--temperature", default=0.05, show_default=True)
@click.option("--query-tokens", default=32, show_default=True)
@click.option("--passage-tokens", default=64, show_default=True)
@click.option("--kl-weight", default=1.0, show_default=True)
@click.option("--distil-temperature", default=1.0, show_default=True, help="Of the teacher's scores.")
@click.option("--teacher-batch", default=32, show_default=True)
@click.option("--teacher-group", default=8, show_default=True)
@click.option("--teacher-epochs", default=1, show_default=True)
@click.option("--teacher-steps", default=300, show_default=True)
@click.option("--teacher-rate", default=5e-5, show_default=True)
@click.option("--teacher-tokens", default=96, show_default=True, help="Of a pair.")
@click.option("--rerank-top", default=20, show_default=True, help="Passages that the teacher is evaluated on.")
@click.option("--report", "path", type=click.Path(dir_okay=False), help="Write the report here.")
def main(folder: str, only: str, seeds: str, path: str | None, **options: Any) -> None:
    """Do what is not done yet, and print the report."""
    load, bench = os.getloadavg(), Bench((ROOT / folder).resolve(), options)
    bench.folder.mkdir(parents=True, exist_ok=True)
    wanted = [] if only == "none" else only.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        raise click.UsageError(f"--only {','.join(unknown)}: choose from {', '.join(PARTS)}, none")
    numbers = [int(seed) for seed in seeds.split(",")]
    if "base" in wanted:
        base(bench)
    for seed in numbers:
        for variant in VARIANTS:
            if variant in wanted:
                student(bench, variant, seed)
    if "teacher" in wanted:
        teacher_alone(bench)
    head = [f"# Fine-tuning MiniLM on wn-8k, {len(os.sched_getaffinity(0))} cores", ""]
    given = [param.name or "" for param in click.get_current_context().command.params if param.name in options]
    said = " ".join(f"--{name.replace('_', '-')} {options[name]}" for name in given if options[name] is not None)
    head += [f"- `python benchmarks/finetune_quality.py --seeds {seeds} {said}`, all-MiniLM-L6-v2", *machine(load)]
    text = compose(bench, numbers, head).replace(minilm(), "MINILM").replace(f"{ROOT}/", "")
    click.echo(text)
    if path:
        Path(path).write_text(text)


if __name__ == "__main__":
    main()
