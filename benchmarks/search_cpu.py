"""Exact search on this machine's cores beside faiss's IndexFlatIP: same vectors, one run, a Markdown report.

    python benchmarks/search_cpu.py --report benchmarks/search_cpu.md

Every run is a process of its own, which makes the vectors and searches once untimed, as a worker that has had a shard before;
contenders take turns, and every ratio is taken inside one round. `flat` fills an index and searches it, `flat-filled` only
searches one that was filled before.
"""

import json
import os
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.process import run_python
from benchmarks.reporting import machine, spread, verdict

CONTENDERS = ("flat", "flat-filled", "shoal")
BAR = 1.0  # at least as fast as `flat`
MOST_BYTES = 4 << 30


def vectors(passages: int, queries: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors about 200 centres, as texts on some subjects are."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((200, dim))
    made = []
    for count in (passages, queries):
        rows = 0.7 * centres[random.integers(0, len(centres), count)] + random.standard_normal((count, dim))
        made.append((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    return made[0], made[1]


def play(contender: str, sizes: tuple[int, int, int], most: int, output: Path) -> None:
    """Search as one contender; write the seconds, the peak memory, and the sums of each query's scores."""
    threads = len(os.sched_getaffinity(0))
    passages, queries = vectors(*sizes)
    search = {"flat": _flat, "flat-filled": _filled, "shoal": _shoal}[contender](passages, threads)
    search(queries, most)
    began = time.perf_counter()
    scores = search(queries, most)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    output.write_text(json.dumps({"seconds": seconds, "bytes": peak, "sums": scores.sum(axis=1, dtype=float).tolist()}))


def _flat(passages: np.ndarray, threads: int):
    import faiss

    faiss.omp_set_num_threads(threads)

    def search(queries: np.ndarray, most: int) -> np.ndarray:
        index = faiss.IndexFlatIP(passages.shape[1])
        index.add(passages)
        return index.search(queries, most)[0]

    return search


def _filled(passages: np.ndarray, threads: int):
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(passages.shape[1])
    index.add(passages)
    return lambda queries, most: index.search(queries, most)[0]


def _shoal(passages: np.ndarray, threads: int):
    from lib.index.exact.topk import exact_top_k

    search, ranks = exact_top_k("cpu", threads), np.random.default_rng(1).permutation(len(passages))
    return lambda queries, most: search(queries, passages, ranks, most)[0]


def report(told: dict[str, list[dict]], head: list[str], line: str) -> str:
    said = [f"# Exact search on {head[1].split(',')[0].removeprefix('- ')}", "", f"- {line}", *head, ""]
    said += ["| contender | seconds | GiB at most | sums of scores off by at most |", "|---|---|---|---|"]
    for name, runs in told.items():
        off = max(np.abs(np.array(run["sums"]) - told["flat"][0]["sums"]).max() for run in runs)
        peak = max(run["bytes"] for run in runs) / 2**30
        said.append(f"| {name} | {spread([run['seconds'] for run in runs])} | {peak:.2f} | {off:.1e} |")
    said += ["", "| bar | asked | median (least - most) | |", "|---|---|---|---|"]
    for peer in ("flat", "flat-filled"):
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(told[peer], told["shoal"], strict=True)]
        said.append(f"| {peer} over shoal | >= {BAR} | {spread(ratios)} | {verdict(median(ratios) >= BAR)} |")
    most = max(run["bytes"] for run in told["shoal"])
    said.append(f"| memory | <= 4 GiB | {most / 2**30:.2f} | {verdict(most <= MOST_BYTES)} |")
    return "\n".join(said) + "\n"


@click.command()
@click.option("--passages", default=100_000, show_default=True)
@click.option("--queries", default=2_000, show_default=True)
@click.option("--dim", default=384, show_default=True)
@click.option("--most", default=1_000, show_default=True, help="Passages a query.")
@click.option("--rounds", default=7, show_default=True, help="Runs of every contender.")
@click.option("--report", "path", type=click.Path(dir_okay=False), help="Also write the report here.")
@click.option("--play", "part", nargs=2, hidden=True)
def main(
    passages: int, queries: int, dim: int, most: int, rounds: int, path: str | None, part: tuple[str, str] | None
) -> None:
    """Run every contender and print the report."""
    if part:
        return play(part[0], (passages, queries, dim), most, Path(part[1]))
    load = os.getloadavg()
    sizes = ["--passages", str(passages), "--queries", str(queries), "--dim", str(dim), "--most", str(most)]
    told: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="shoal-search-") as folder:
        output = Path(folder) / "out.json"
        for number in range(rounds):
            for contender in CONTENDERS[number % 3 :] + CONTENDERS[: number % 3]:
                run_python(contender, ["-m", "benchmarks.search_cpu", *sizes, "--play", contender, str(output)])
                told[contender].append(json.loads(output.read_text()))
                click.echo(f"{number + 1}/{rounds}  {contender:<12} {told[contender][-1]['seconds']:.2f} s", err=True)
    line = f"`python benchmarks/search_cpu.py {' '.join(sizes)} --rounds {rounds}`, top {most:,}, float32"
    text = report(told, machine(load), line)
    click.echo(text)
    if path:
        Path(path).write_text(text)


if __name__ == "__main__":
    main()
