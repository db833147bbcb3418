"""The embed job on this machine's cores beside its peers: same texts, same weights, one run, a Markdown report.

    python benchmarks/embed_cpu.py --report benchmarks/embed_cpu.md

Every run is a process of its own. The contenders take turns, round by round, so that a busy moment of a shared machine
meets all of them; every ratio is taken inside one round.
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.corpora import mixed_lengths
from benchmarks.demo import minilm
from benchmarks.process import run_python
from benchmarks.reporting import cosines, machine, spread, verdict

PERCENTILES = (0, 10, 25, 50, 75, 90, 99, 100)
CLOCKS = ("wall", "work")
CONTENDERS = ("st", "ray-data", "float32", "bfloat16", "loop-float32", "loop-bfloat16")
SPEED_BARS = (  # what, the slower, the faster, least ratio
    ("float32 against sentence-transformers", "st", "float32", 1.35),
    ("bf16 against sentence-transformers", "st", "bfloat16", 2.2),
    ("float32 against Ray Data + sentence-transformers", "ray-data", "float32", 1.5),
)
MOST_OVERHEAD = 0.10
PRECHECK_TEXTS = 4096
NOTES = """
wall: seconds of the whole process, from start to exit. work: from the first read to the last write, without starting
Python and Ray and without loading the model. sentence-transformers and the bare loop measure it inside. Of Ray Data it
runs from the first batch that a loaded actor takes, of the job from the first shard that a loaded worker takes, both
until the last part is written: reading before that moment is left out, waiting for a second actor's model is in.
Ratios are taken inside each round; median (least - most)."""


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    corpus: Path
    model: str
    folder: Path
    cores: int
    shard_rows: int | None
    ray_actors: int  # each takes cores / ray_actors threads
    ray_batch: int


@dataclass(frozen=True)
class Run:
    """One run of one contender: seconds, and the lines of the job's report about them."""

    wall: float
    work: float
    said: tuple[str, ...] = ()


Runs = dict[str, list[Run]]  # by contender, one a round


def command(bench: Bench, name: str, output: Path) -> list[str]:
    """The contender's command line."""
    if name in ("float32", "bfloat16"):
        return ["jobs/embed_corpus.py", *_job_options(bench, name, output)]
    options: dict[str, list[object]] = {
        "st": ["sentence-transformers"],
        "ray-data": ["ray-data", "--actors", bench.ray_actors, "--threads", bench.cores // bench.ray_actors],
    }
    options["ray-data"] += ["--batch-size", bench.ray_batch]
    if name.startswith("loop-"):
        options[name] = ["encoder-loop", "--dtype", name.removeprefix("loop-"), "--processes", bench.cores]
        options[name] += ["--shard-rows", bench.shard_rows or _default_rows(bench)]
    return ["benchmarks/peers.py", *map(str, options[name]), str(bench.corpus), str(output), bench.model]


def _job_options(bench: Bench, dtype: str, output: Path) -> list[str]:
    line = ["--input", str(bench.corpus), "--output", str(output), "--model", bench.model, "--dtype", dtype]
    return line + (["--shard-rows", str(bench.shard_rows)] if bench.shard_rows else [])


def _default_rows(bench: Bench) -> int:
    """Rows a shard that the job chooses for this corpus: eight shards a worker, of a thousand rows at least."""
    return max(1000, pq.read_metadata(bench.corpus).num_rows // (8 * bench.cores))


def run(bench: Bench, name: str, output: Path) -> Run:
    began = time.perf_counter()
    stdout = run_python(name, command(bench, name, output))
    wall = time.perf_counter() - began
    said = tuple(line for line in stdout.splitlines() if line.startswith(("this run", "padding", "time in")))
    work = _work(stdout)
    click.echo(f"  {name:<14} wall {wall:7.1f} s   work {work:7.1f} s   load {os.getloadavg()[0]:.1f}", err=True)
    return Run(wall, work, said)


def _work(stdout: str) -> float:
    """Seconds of work: a number in the job's report, a field of a peer's JSON line."""
    if found := re.search(r"([\d.]+) s of them with a model loaded", stdout):
        return float(found[1])
    return float(json.loads(stdout.splitlines()[-1])["work"])


def embeddings(output: Path) -> np.ndarray:
    """The vectors of a contender in the order of their ids, float32 [texts, dim]."""
    files = sorted(output.glob("[!_]*.parquet")) if output.is_dir() else [output]
    tables = [pq.read_table(file, columns=["id", "embedding"]) for file in files]
    ids = np.concatenate([table["id"].to_numpy() for table in tables])
    rows = [_matrix(table["embedding"].combine_chunks()) for table in tables]
    return np.concatenate(rows)[np.argsort(ids)]


def _matrix(column: pa.Array) -> np.ndarray:
    plain = column.storage if isinstance(column, pa.ExtensionArray) else column
    return plain.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def choose_actors(bench: Bench) -> tuple[Bench, str]:
    """Ray Data with one actor of all cores, or with an actor a core: whichever works faster on the first texts."""
    if bench.cores == 1:
        return replace(bench, ray_actors=1), "one core, so one actor"
    few = bench.folder / "few.parquet"
    pq.write_table(pq.read_table(bench.corpus).slice(0, PRECHECK_TEXTS), few)
    tried = {n: replace(bench, corpus=few, ray_actors=n) for n in (1, bench.cores)}
    work = {n: run(each, "ray-data", bench.folder / f"few-{n}").work for n, each in tried.items()}
    best = min(work, key=work.__getitem__)
    said = ", ".join(f"{n} x {bench.cores // n} {seconds:.1f} s of work" for n, seconds in work.items())
    return replace(bench, ray_actors=best), f"Ray Data, actors x threads on at most {PRECHECK_TEXTS:,} texts: {said}"


def ratios(runs: Runs, slower: str, faster: str, clock: str) -> list[float]:
    """How many times as fast `faster` is, round by round. clock: "wall" | "work"."""
    pairs = zip(runs[slower], runs[faster], strict=True)
    return [getattr(slow, clock) / getattr(fast, clock) for slow, fast in pairs]


def contenders_table(runs: Runs, texts: int, tokens: int, labels: dict[str, str]) -> list[str]:
    lines = [
        "| contender | wall s | work s | texts/s, wall | tokens/s, wall | tokens/s, work | x st, wall | x st, work |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, mine in runs.items():
        wall, work = median(one.wall for one in mine), median(one.work for one in mine)
        cells = [labels[name], *(spread([getattr(one, clock) for one in mine], "{:.1f}") for clock in CLOCKS)]
        cells += [f"{texts / wall:,.0f}", f"{tokens / wall:,.0f}", f"{tokens / work:,.0f}"]
        cells += [spread(ratios(runs, "st", name, clock)) for clock in CLOCKS]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def bars_table(runs: Runs) -> list[str]:
    """What is asked, and whether the median meets it."""
    lines = ["| bar | asked | measured on | median (least - most) | |", "|---|---|---|---|---|"]
    for what, slower, faster, least in SPEED_BARS:
        for clock in CLOCKS:
            found = ratios(runs, slower, faster, clock)
            lines.append(f"| {what} | >= {least} | {clock} | {spread(found)} | {verdict(median(found) >= least)} |")
    for dtype in ("float32", "bfloat16"):
        found = [1 / ratio - 1 for ratio in ratios(runs, f"loop-{dtype}", dtype, "work")]
        met = verdict(median(found) <= MOST_OVERHEAD)
        asked, measured = f"<= {MOST_OVERHEAD:.0%}", spread(found, "{:.1%}")
        lines.append(f"| job over bare encoder loop, {dtype} | {asked} | work | {measured} | {met} |")
    return lines


def agreement_table(outputs: dict[str, Path], labels: dict[str, str]) -> list[str]:
    lines = ["| contender | least cosine with st | mean |", "|---|---|---|"]
    reference = embeddings(outputs["st"])
    for name in outputs:
        found = cosines(reference, embeddings(outputs[name]))
        lines.append(f"| {labels[name]} | {found.min():.6f} | {found.mean():.6f} |")
    return lines


def _labels(bench: Bench) -> dict[str, str]:
    cores, actors = bench.cores, bench.ray_actors
    loop = f"bare encoder loop, {cores} processes x 1 thread"
    return {
        "st": f"st: sentence-transformers `encode`, defaults, {cores} threads",
        "ray-data": f"Ray Data `map_batches` + sentence-transformers, {actors} actors x {cores // actors} threads, "
        f"batches of {bench.ray_batch}",
        "float32": "`jobs/embed_corpus.py --dtype float32`",
        "bfloat16": "`jobs/embed_corpus.py --dtype bfloat16`",
        "loop-float32": f"{loop}, float32",
        "loop-bfloat16": f"{loop}, bfloat16",
    }


def count_tokens(texts: Sequence[str], model: str) -> tuple[int, str]:
    """Tokens that the model sees, and a line on the lengths of the texts by the model's own tokenizer."""
    from lib.models.spec_reader import read_spec
    from lib.models.tokenizer import Tokenizer
    from lib.recipes import Recipe

    spec = read_spec(model)
    whole = np.diff(Tokenizer(read_spec(model, Recipe(max_tokens=512)))(texts).offsets)
    seen = np.minimum(whole, spec.max_tokens)
    spots = ", ".join(f"p{spot} {np.percentile(whole, spot):.0f}" for spot in PERCENTILES)
    cut = f"the model cuts {np.mean(whole > spec.max_tokens):.1%} of the texts at {spec.max_tokens}"
    return int(seen.sum()), f"tokens a text: mean {whole.mean():.1f}, {spots}; {cut}, {seen.sum():,} tokens are left"


def play_round(bench: Bench, number: int) -> dict[str, tuple[Run, Path]]:
    """One run of each contender, in turn."""
    folder = bench.folder / f"round-{number}"
    folder.mkdir()
    return {name: (run(bench, name, folder / name), folder / name) for name in CONTENDERS}


def compose(bench: Bench, runs: Runs, outputs: dict[str, Path], tokens: int, head: list[str]) -> str:
    texts, labels = pq.read_metadata(bench.corpus).num_rows, _labels(bench)
    said = {name: (f"{name}, last round:", *runs[name][-1].said) for name in ("float32", "bfloat16")}
    shares = [f"    {line}" for lines in said.values() for line in lines]
    sections: tuple[tuple[str, list[str]], ...] = (
        (f"# Embedding {texts:,} texts on {bench.cores} cores", head),
        (f"## Contenders: {len(runs['st'])} rounds", [*contenders_table(runs, texts, tokens, labels), NOTES]),
        ("## Bars", bars_table(runs)),
        ("## Agreement", agreement_table(outputs, labels)),
        ("## Where the time goes, by the job's own report", shares),
    )
    return "\n\n".join(f"{title}\n\n" + "\n".join(lines) for title, lines in sections) + "\n"


def write_corpus(texts: Sequence[str], path: Path) -> None:
    pq.write_table(pa.table({"id": np.arange(len(texts)), "text": pa.array(texts)}), path)


def _in_folder(work: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="embed_cpu_") as folder:
        work(Path(folder))


@click.command()
@click.option("--texts", default=20_000, show_default=True, help="Texts of mixed length, 5 to 400 tokens.")
@click.option("--rounds", default=5, show_default=True, help="Runs of every contender.")
@click.option("--shard-rows", type=int, help="Rows a shard. Default: the job's own choice.")
@click.option("--ray-batch", default=1024, show_default=True, help="Texts a batch of the Ray Data script.")
@click.option("--report", type=click.Path(dir_okay=False), help="Also write the report here, anew after every round.")
def main(texts: int, rounds: int, shard_rows: int | None, ray_batch: int, report: str | None) -> None:
    """Measure the embed job on this machine's cores beside its peers."""

    def work(folder: Path) -> None:
        load, model, corpus = os.getloadavg(), minilm(), mixed_lengths(texts)
        tokens, lengths = count_tokens(corpus, model)
        write_corpus(corpus, folder / "corpus.parquet")
        cores = len(os.sched_getaffinity(0))
        bench, tried = choose_actors(Bench(folder / "corpus.parquet", model, folder, cores, shard_rows, 1, ray_batch))
        options = f"--texts {texts} --rounds {rounds} --ray-batch {ray_batch}"
        options += f" --shard-rows {shard_rows}" if shard_rows else ""
        line = f"`python benchmarks/embed_cpu.py {options}`, all-MiniLM-L6-v2"
        head = [f"- {line}", *machine(load), f"- {lengths}", f"- {tried}"]
        runs: Runs = {name: [] for name in CONTENDERS}
        for number in range(rounds):
            click.echo(f"round {number + 1} of {rounds}", err=True)
            done = play_round(bench, number)
            for name, (one, _) in done.items():
                runs[name].append(one)
            outputs = {name: output for name, (_, output) in done.items()}
            text = compose(bench, runs, outputs, tokens, head)
            if report:
                Path(report).write_text(text)
        click.echo(text)

    _in_folder(work)


if __name__ == "__main__":
    main()
