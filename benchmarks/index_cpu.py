"""Index builds on this machine's cores: time, memory, recall; beside a plain faiss script and beside lance-ray.

    python benchmarks/index_cpu.py --only build
    python benchmarks/index_cpu.py --report benchmarks/index_cpu.md         # all that is not done yet, and the report
    python benchmarks/index_cpu.py --rows 20000 --texts 500 --lists 128 --lance-training ours    # to try it out

build    jobs/build_index.py, the first of --kinds, on all cores: seconds, memory of every process, recall twice
others   the same of the other kinds
script   the first kind on one core, beside benchmarks/index_script.py on one core
scaling  encoding part of the rows with one worker and with as many as there are cores
lance    lance-ray's distributed build of what is nearest to each kind, from the same files, in an environment of its own
autofaiss    its build of the first kind, a product quantizer, likewise

Every run is a row of results.json in --folder: what is there is not done again, and a run that was stopped goes on. Ratios
are taken inside a round.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq

from benchmarks import index_report
from benchmarks.index_recall import CUT, load_questions, over, questions_of, recalls, search, without_own
from benchmarks.index_runs import Bench, Row, job, run, warm
from benchmarks.index_vectors import Vectors, prepare, told
from benchmarks.process import ROOT
from benchmarks.reporting import machine, verdict
from lib.engine.parts import read_facts, read_manifest
from lib.index.build.kmeans import ITERATIONS
from lib.index.build.layout import SEGMENTS
from lib.index.build.train import POINTS
from lib.index.kinds import CODEBOOK_ITERATIONS, parse
from lib.storage.folder import Folder
from tests.real.tasks import PLACE

PARTS = ("build", "others", "script", "scaling", "lance", "autofaiss")
LANCE = ("lance-ray==0.5.0", "pylance==14.0.2", "ray==2.60.0", "numpy", "pyarrow")
AUTOFAISS = ("autofaiss==2.18.0", "pyarrow<20")  # later ones want numpy 2, which autofaiss does not
AUTOFAISS_MEMORY = "2G", "8G"  # of the index, and of all that it does
LANCE_KINDS: dict[str, Row] = {
    "ivf-pq": {"index_type": "IVF_PQ"},  # with as many bytes a vector: see lance_index
    "ivf-rabitq:bits=1": {"index_type": "IVF_RQ", "num_bits": 1},
    "ivf-sq8": {"index_type": "IVF_SQ"},
}
TRAININGS: dict[str, Row] = {"ours": {"sample_rate": POINTS, "max_iters": ITERATIONS}, "default": {}}
COMPARED = (4, 16, 64, 256)  # probes, those of them that the card has


def build(bench: Bench, number: int, kind: str) -> Row:
    key = bench.key(number, "build", kind)

    def make() -> Row:
        cores = bench.options["cores"]
        row, output = job(bench, key, kind, cores, cores)
        questions, card = questions_of(output, bench.vectors, bench.folder), row["card"]["recall"]
        found = search(sorted((output / SEGMENTS).glob("*.faiss")), questions, [each["value"] for each in card])
        np.savez(bench.file(key, "npz"), **found)
        shutil.rmtree(output)
        told = recalls(found, bench.vectors, questions)
        off = max(abs(each["recall@10"][0] - told[f"held-{each['value']}"]) for each in card)
        return row | {"recall": told, "off": off, "questions": questions.path.name}

    return bench.once(key, make)


def script(bench: Bench, number: int, kind: str) -> Row:
    """Both on one core; recall of the script's index less that of the build's."""
    key = bench.key(number, "script", kind)

    def make() -> Row:
        ours, output = job(bench, key, kind, cores=1, workers=1)
        stage = Folder(str(output / "_stages/train"))
        (facts,) = read_facts(stage, read_manifest(stage))
        rows = facts["rows"]
        card, index, log = ours["card"], bench.file(key, "faiss"), bench.file(f"{key} theirs", "log")
        name = parse(kind).key(card["dim"]).format(lists=f"IVF{card['lists']}")
        warm(bench.vectors.files)
        line = [sys.executable, "benchmarks/index_script.py", bench.vectors.folder, index, name]
        line += [bench.options["metric"], rows, ITERATIONS, CODEBOOK_ITERATIONS]
        theirs = run(line, log, cores=1)
        theirs["seconds"] = json.loads(log.read_text().splitlines()[-1])
        questions, probes = questions_of(output, bench.vectors, bench.folder), compared(card)
        mine = search(sorted((output / SEGMENTS).glob("*.faiss")), questions, probes)
        found = search([index], questions, probes)
        index.unlink()
        shutil.rmtree(output)
        told = {"key": name, "sample": rows, "wall": ours["wall"] + theirs["wall"], "ours": ours, "theirs": theirs}
        return told | {
            "recall": recalls(found, bench.vectors, questions),
            "over": over(mine, found, bench.vectors, questions),
        }

    return bench.once(key, make)


def compared(card: Row) -> list[int]:
    return [each["value"] for each in card["recall"] if each["value"] in COMPARED]


def scaling_runs(bench: Bench, number: int, kind: str) -> list[tuple[int, int, str]]:
    """Workers, cores and key: workers on all cores, one worker on all cores, one worker on one."""
    cores, rows = bench.options["cores"], scaling_rows(bench)
    return [
        (workers, on, bench.key(number, "scaling", kind, f"{rows} rows", f"{workers} workers on {on}"))
        for workers, on in ((cores, cores), (1, cores), (1, 1))
    ]


def scaling_rows(bench: Bench) -> int:
    return min(bench.options["scaling_rows"], bench.vectors.rows)


def scaling(bench: Bench, number: int, kind: str) -> None:
    """Builds of the first rows."""
    for workers, on, key in scaling_runs(bench, number, kind):

        def make(workers: int = workers, on: int = on, key: str = key) -> Row:
            row, output = job(bench, key, kind, on, workers, limit=scaling_rows(bench))
            shutil.rmtree(output)
            return row

        bench.once(key, make)


def python_with(name: str, packages: Sequence[str], modules: str) -> Path:
    """The Python of an environment of its own, made where there is none."""
    place = PLACE / f"{name}-venv"
    python = place / "bin/python"
    line = [str(python), "-c", f"import {modules}"]
    if not python.exists() or subprocess.run(line, capture_output=True).returncode:
        click.echo(f"pip install {' '.join(packages)}", err=True)
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def lance_index(bench: Bench, kind: str, card: Row, training: str) -> Row:
    """Arguments of lance_ray.create_index."""
    named = LANCE_KINDS[kind] | TRAININGS[training]
    if kind == "ivf-pq":
        named |= {"num_sub_vectors": int(parse(kind).bytes(card["dim"]))}
    return named | {"num_partitions": card["lists"], "metric": bench.options["lance_metric"]}


def lance_key(bench: Bench, number: int, kind: str, training: str) -> str:
    return bench.key(number, "lance", kind, training, bench.options["lance_metric"])


def lance(bench: Bench, number: int, kind: str, training: str) -> Row:
    """Beside the build of the same round: the same questions, lists and probes."""
    built, key = build(bench, number, kind), lance_key(bench, number, kind, training)

    def make() -> Row:
        dataset, found = bench.folder / "lance", bench.file(key, "npz")
        shutil.rmtree(dataset, ignore_errors=True)
        path = bench.folder / built["questions"]
        settings: Row = {"input": bench.vectors.folder, "dataset": dataset, "workers": bench.options["cores"]}
        settings |= {"rows_a_file": pq.read_metadata(bench.vectors.files[0]).num_rows, "questions": path}
        settings |= {"index": lance_index(bench, kind, built["card"], training), "probes": compared(built["card"])}
        settings |= {"most": CUT + 1, "found": found}
        told, given = bench.file(key, "json"), bench.file(f"{key} settings", "json")
        given.write_text(json.dumps(settings, default=str))
        warm(bench.vectors.files)
        line = [python_with("lance", LANCE, "lance_ray, lance"), "benchmarks/index_lance.py", given, told]
        row = run(line, bench.file(key, "log"), bench.options["cores"]) | json.loads(told.read_text())
        shutil.rmtree(dataset)
        questions, mine = load_questions(path), np.load(bench.file(bench.key(number, "build", kind), "npz"))
        theirs = without_own(dict(np.load(found)), questions)
        row |= {"index": settings["index"], "recall": recalls(theirs, bench.vectors, questions)}
        return row | {"over": over(mine, theirs, bench.vectors, questions)}

    return bench.once(key, make)


def autofaiss(bench: Bench, number: int, kind: str) -> Row:
    """Beside the build of the same round: the same questions, lists and probes, one process with a thread a core."""
    built, key = build(bench, number, kind), bench.key(number, "autofaiss", kind)

    def make() -> Row:
        card, index, log = built["card"], bench.file(key, "faiss"), bench.file(key, "log")
        name = f"IVF{card['lists']},PQ{parse(kind).bytes(card['dim']):.0f}"
        warm(bench.vectors.files)
        line = [python_with("autofaiss", AUTOFAISS, "autofaiss"), "benchmarks/index_autofaiss.py", bench.vectors.folder]
        line += [index, name, "l2", bench.options["cores"], *AUTOFAISS_MEMORY]
        row = run(line, log, bench.options["cores"]) | json.loads(log.read_text().splitlines()[-1])
        questions = load_questions(bench.folder / built["questions"])
        mine = np.load(bench.file(bench.key(number, "build", kind), "npz"))
        theirs = search([index], questions, compared(card))
        index.unlink()
        return row | {
            "key": name,
            "recall": recalls(theirs, bench.vectors, questions),
            "over": over(mine, theirs, bench.vectors, questions),
        }

    return bench.once(key, make)


def collected(bench: Bench, number: int, kinds: Sequence[str], trainings: Sequence[str]) -> Row:
    """The rows of a round that are there."""
    results = bench.results
    keys = {
        "build": {kind: bench.key(number, "build", kind) for kind in kinds},
        "script": {kinds[0]: bench.key(number, "script", kinds[0])},
        "scaling": {(workers, on): key for workers, on, key in scaling_runs(bench, number, kinds[0])},
        "autofaiss": {kinds[0]: bench.key(number, "autofaiss", kinds[0])},
        "lance": {(kind, each): lance_key(bench, number, kind, each) for kind in kinds for each in trainings},
    }
    return {part: {name: results[key] for name, key in each.items() if key in results} for part, each in keys.items()}


def check(parts: set[str], kinds: str) -> None:
    """Raises UsageError for what there is not."""
    if parts - set(PARTS):
        raise click.UsageError(f"--only {','.join(sorted(parts - set(PARTS)))}: choose from {', '.join(PARTS)}, none")
    if "lance" in parts and set(kinds.split(",")) - set(LANCE_KINDS):
        raise click.UsageError(f"--kinds {kinds}: lance-ray has {', '.join(LANCE_KINDS)}")
    if "autofaiss" in parts and kinds.split(",")[0].partition(":")[0] != "ivf-pq":
        raise click.UsageError(f"--kinds {kinds}: autofaiss is held against ivf-pq, which must come first")


def one_round(bench: Bench, number: int, parts: set[str], kinds: Sequence[str], trainings: Sequence[str]) -> None:
    for kind in kinds:
        if ("build" if kind == kinds[0] else "others") in parts:
            build(bench, number, kind)
        for training in trainings if "lance" in parts else ():
            lance(bench, number, kind, training)
    for name, part in (("autofaiss", autofaiss), ("script", script), ("scaling", scaling)):
        if name in parts:
            part(bench, number, kinds[0])


@click.command()
@click.option("--folder", default=".tasks/index-cpu", show_default=True, help="Runs and results.json.")
@click.option("--only", default=",".join(PARTS), show_default=True, help="What to do, by commas, or none.")
@click.option("--kinds", default=",".join(LANCE_KINDS), show_default=True, help="By commas, the most important first.")
@click.option("--rounds", default=1, show_default=True, help="Runs of everything.")
@click.option("--rows", default=2_000_000, show_default=True)
@click.option("--texts", type=int, help="Passages the vectors are mixed of. Default: all of WordNet.")
@click.option("--lists", type=int, help="Default: what the job takes.")
@click.option(
    "--metric",
    type=click.Choice(["cosine", "ip", "l2"]),
    default="cosine",
    show_default=True,
    help="Of ours, and the script's.",
)
@click.option("--queries", default=1000, show_default=True, help="Held out of the sample.")
@click.option("--cores", default=2, show_default=True, help="And workers.")
@click.option("--scaling-rows", default=500_000, show_default=True)
@click.option("--lance-training", default=",".join(TRAININGS), show_default=True, help="Whose sample and iterations.")
@click.option("--lance-metric", default="cosine", show_default=True)
@click.option("--report", "path", type=click.Path(dir_okay=False), help="Write the report here.")
def main(folder: str, only: str, kinds: str, rounds: int, path: str | None, **options: Any) -> None:
    """Do what is not done yet, and print the report."""
    load, parts = os.getloadavg(), set(only.split(",")) - {"none"}
    check(parts, kinds)
    bench = Bench((ROOT / folder).resolve(), Vectors(options["rows"], options["texts"]), options)
    bench.folder.mkdir(parents=True, exist_ok=True)
    made, (first, *others) = prepare(bench.vectors), kinds.split(",")
    trainings = options["lance_training"].split(",")
    for number in range(rounds):
        one_round(bench, number, parts, (first, *others), trainings)
    given = [param.name or "" for param in click.get_current_context().command.params if param.name in options]
    said = " ".join(f"--{name.replace('_', '-')} {options[name]!r}" for name in given if options[name] is not None)
    found = [collected(bench, number, (first, *others), trainings) for number in range(rounds)]
    there = {part for part in PARTS for each in found if each.get(part)} | (
        {"others"} if len(found[0]["build"]) > 1 else set()
    )
    told_of = f"--only {','.join(part for part in PARTS if part in there)} --kinds {','.join(found[0]['build'])}"
    head = [f"- `python benchmarks/index_cpu.py --rounds {rounds} {told_of} {said}`", *machine(load)]
    text = index_report.compose(found, [*head, *(f"- {line}" for line in told(made))], options["cores"])
    click.echo(text)
    if path:
        Path(path).write_text(text)
    if missed := text.count(f"| {verdict(False)} |"):
        raise click.ClickException(f"{missed} bars are missed")


if __name__ == "__main__":
    main()
