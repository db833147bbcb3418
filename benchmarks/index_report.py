"""The report of the index benchmark: what its rounds found, as Markdown."""

from collections.abc import Sequence
from statistics import median

from benchmarks import reporting
from benchmarks.index_runs import INTERVAL, Row
from benchmarks.reporting import verdict

OUR_STAGES = ("sample", "train", "encode", "assemble")  # of a build; recall is measured after them
THEIR_STEPS = ("sample", "train", "add", "write")
PROCESS, TOTAL = 3 * 2**30, 8 * 10**9  # bytes a process may have to itself; bytes that all may take together
CLOSE, SCRIPT_RATIO, SCALING = 1e-4, 1.1, 1.7
MEASURES = ("unshared", "rss", "kernel_rss")
LISTED = 8  # processes of a run that its table shows
HEADER = ["| bar | asked | measured | |", "|---|---|---|---|"]
BUILD_NOTE = """
Median (least - most) of the rounds. Seconds of a stage are card.json's: the driver's clock, the start of the stage's workers in
it. Ray was started before the first stage. Vectors/s: over the four stages that build."""
MEMORY_NOTE = f"""
unshared: resident bytes less those that are shared or of files (psutil: rss - shared), looked at every {INTERVAL:g} s; peak: of
all resident bytes, as the kernel keeps it (VmHWM), shared ones in it. Each process at its own peak; of the first round. All
together: the unshared bytes of all processes at one time, and by how much the machine's shared memory had grown.
benchmarks.index_job is jobs/build_index.py, the driver."""
RECALL_NOTE = """
held: vectors held out of the training sample, each without its own row, as the card asks them. real: usage examples of WordNet,
which are in no passage. True lists: numpy's float32 products over the input files; found is what is as near as the tenth of them,
by products in float64, but for 1e-6. Searches: faiss.read_index of the segments."""
SCRIPT_NOTE = """
Both on one core, which all processes of a side share, with one thread, as many vectors to train on and as many iterations."""
SCALING_NOTE = """
Of the stage `encode`; each worker has one CPU. It reads and writes, too; other cores idle."""
LANCE_NOTE = """
Both sides: same files, lists and probes, a worker a core, Ray started before; as many bytes a code where a kind has a choice.
Training `ours`: sample_rate and max_iters of create_index are our vectors a list and iterations; `default`: its own.
Copy: ray.data.read_parquet to lance_ray.write_lance, which it needs, as it indexes Lance datasets alone. Searches without
refinement, approx_mode "accurate". over theirs: our recall@10 less theirs, question by question (95 % interval; round 1)."""

AUTOFAISS_NOTE = """
Both sides: same files, lists, bytes a code, probes and cores. autofaiss samples and iterates as it likes, and its product quantizer
is trained polysemously."""


def compose(rounds: Sequence[Row], head: Sequence[str], cores: int) -> str:
    """rounds: of each, the rows that are there, by part and by what they are of."""
    when = sorted(row["at"] for found in rounds for part in found.values() for row in part.values())
    lines = [f"# Index builds on {cores} cores", "", *head]
    lines += [f"- runs of {when[0]} to {when[-1]}"] if when else []
    bars: list[str] = []
    for section in (_builds, _memory, _recall, _script, _scaling, _lance, _autofaiss):
        lines += section(rounds, bars)
    return "\n".join([*lines, *(["", "## Bars", "", *HEADER, *bars] if bars else [])]) + "\n"


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median (least - most); of one value that alone."""
    return reporting.spread(values, form) if len(values) > 1 else form.format(values[0])


def _rows(rounds: Sequence[Row], part: str) -> dict:
    """By what they are of: the rows of all rounds that have them."""
    names = dict.fromkeys(name for found in rounds for name in found[part])
    return {name: [found[part][name] for found in rounds if name in found[part]] for name in names}


def _bar(name: str, asked: str, measured: str, met: bool) -> str:
    return f"| {name} | {asked} | {measured} | {verdict(met)} |"


def _seconds(row: Row) -> float:
    """Of building; recall is measured after it."""
    return sum(row["seconds"][stage] for stage in OUR_STAGES)


def _gib(values: Sequence[float]) -> str:
    return spread([value / 2**30 for value in values])


def _table(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _builds(rounds: Sequence[Row], bars: list[str]) -> list[str]:
    rows = _rows(rounds, "build")
    lines = [
        "",
        "## Builds",
        "",
        *_table("kind", "lists", "bytes a vector", "Ray starts", *OUR_STAGES, "together", "vectors/s", "then measure"),
    ]
    for kind, runs in rows.items():
        card = runs[0]["card"]
        cells = [spread([run["ray"] for run in runs], "{:.1f}")]
        cells += [spread([run["seconds"][stage] for run in runs], "{:.1f}") for stage in OUR_STAGES]
        cells += [spread([_seconds(run) for run in runs], "{:.1f}")]
        cells += [spread([card["vectors"] / _seconds(run) for run in runs], "{:,.0f}")]
        cells += [spread([run["seconds"]["measure"] for run in runs], "{:.1f}")]
        lines.append(_line(kind, f"{card['lists']:,}", f"{card['bytes_per_vector']:.1f}", *cells))
    return [*lines, BUILD_NOTE] if rows else []


def _memory(rounds: Sequence[Row], bars: list[str]) -> list[str]:
    lines = ["", "## Memory", "", *_table("kind", "process", "unshared MiB", "rss MiB", "peak MiB")]
    rows = _rows(rounds, "build")
    for kind, runs in rows.items():
        for each in runs[0]["processes"][:LISTED]:
            lines.append(_line(kind, each["name"], *(f"{each[name] / 2**20:,.0f}" for name in MEASURES)))
        most = {name: [max(each[name] for each in run["processes"]) for run in runs] for name in MEASURES}
        each_most = [spread([value / 2**20 for value in values], "{:,.0f}") for values in most.values()]
        lines.append(_line(kind, "the most of any", *each_most))
        name, met = f"{kind}: GiB of the largest process, unshared", max(most["unshared"]) <= PROCESS
        bars.append(_bar(name, f"<= {PROCESS >> 30}", _gib(most["unshared"]), met))
        total = [run["total"] for run in runs]
        said = spread([each / 1e9 for each in total])
        bars.append(_bar(f"{kind}: GB of all together", f"<= {TOTAL / 1e9:g}", said, max(total) <= TOTAL))
    return [*lines, MEMORY_NOTE] if rows else []


def _recall(rounds: Sequence[Row], bars: list[str]) -> list[str]:
    lines = ["", "## Recall@10", "", *_table("kind", "probes", "the card, held", "numpy, held", "numpy, real")]
    rows = _rows(rounds, "build")
    for kind, runs in rows.items():
        for each in runs[0]["card"]["recall"]:
            value = each["value"]
            mine = [f"{runs[0]['recall'][f'{name}-{value}']:.4f}" for name in ("held", "real")]
            lines.append(_line(kind, value, f"{each['recall@10'][0]:.4f}", *mine))
        off = max(run["off"] for run in runs)
        bars.append(_bar(f"{kind}: recall@10 of the card off by", f"<= {CLOSE:g}", f"{off:.1e}", off <= CLOSE + 1e-9))
    return [*lines, RECALL_NOTE] if rows else []


def _script(rounds: Sequence[Row], bars: list[str]) -> list[str]:
    rows = _rows(rounds, "script")
    lines = ["", "## Beside a plain faiss script", ""]
    for kind, runs in rows.items():
        ours, theirs = ([run[side] for run in runs] for side in ("ours", "theirs"))
        lines.append(f"{kind}: `{runs[0]['key']}`, {runs[0]['sample']:,} vectors to train on.")
        lines += [
            "",
            *_table("", "sample", "train", "encode, or add", "assemble, or write", "together", "Ray starts", "GiB"),
        ]
        for name, side, stages in (("shoal", ours, OUR_STAGES), ("script", theirs, THEIR_STEPS)):
            cells = [spread([run["seconds"][stage] for run in side], "{:.1f}") for stage in stages]
            cells += [spread([sum(run["seconds"][stage] for stage in stages) for run in side], "{:.1f}")]
            cells += [spread([run["ray"] for run in side], "{:.1f}") if side is ours else ""]
            lines.append(_line(name, *cells, _gib([run["total"] for run in side])))
        pairs = [(run, sum(their["seconds"].values())) for run, their in zip(ours, theirs, strict=True)]
        for said, more in (("", 0), (", the start of Ray counted", 1)):
            ratios = [(_seconds(run) + more * run["ray"]) / their for run, their in pairs]
            met = median(ratios) <= SCRIPT_RATIO
            bars.append(
                _bar(f"{kind}: seconds on one core over the script's{said}", f"<= {SCRIPT_RATIO}", spread(ratios), met)
            )
        lines += ["", *_differences("the script's", runs[0]["recall"], runs[0]["over"])]
    return [*lines, SCRIPT_NOTE] if rows else []


def _differences(whose: str, recall: Row, over: Row) -> list[str]:
    """Recall of another's index, and how far ours is over it."""
    lines = _table("questions", "probes", f"recall@10 of {whose}", "over it (95 % interval)")
    for name, value in recall.items():
        questions, probes = name.split("-")
        lines.append(_line(questions, probes, f"{value:.4f}", "{:+.4f} ({:+.4f} to {:+.4f})".format(*over[name])))
    return lines


def _scaling(rounds: Sequence[Row], bars: list[str]) -> list[str]:
    rows = _rows(rounds, "scaling")
    lines = ["", "## Encoding with more workers", "", *_table("workers", "cores", "rows", "encode, s", "rows/s")]
    for (workers, cores), runs in rows.items():
        seconds, count = [run["seconds"]["encode"] for run in runs], runs[0]["card"]["rows"]
        lines.append(
            _line(
                workers, cores, f"{count:,}", spread(seconds, "{:.1f}"), spread([count / s for s in seconds], "{:,.0f}")
            )
        )
    most = max(rows, default=None)
    for one in rows:
        pairs = [
            (found["scaling"][one], found["scaling"][most])
            for found in rounds
            if {one, most} <= found["scaling"].keys()
        ]
        if one != most and pairs:
            ratios = [slow["seconds"]["encode"] / quick["seconds"]["encode"] for slow, quick in pairs]
            name = f"encoding with {most[0]} workers on {most[1]} cores over {one[0]} on {one[1]}"
            bars.append(_bar(name, f">= {SCALING}", spread(ratios), median(ratios) >= SCALING))
    return [*lines, SCALING_NOTE] if rows else []


def _lance(rounds: Sequence[Row], bars: list[str]) -> list[str]:
    rows = _rows(rounds, "lance")
    if not rows:
        return []
    versions = next(iter(rows.values()))[0]["versions"]
    lines = ["", "## Beside lance-ray", "", ", ".join(f"{name} {number}" for name, number in versions.items()), ""]
    lines += _table("kind", "contender", "copy, s", "build, s", "bytes a vector", "largest process, GiB", "all, GiB")
    for kind, runs in _rows(rounds, "build").items():
        card, most = runs[0]["card"], [run["processes"][0]["unshared"] for run in runs]
        cells = [spread([_seconds(run) for run in runs], "{:.1f}"), f"{card['bytes_per_vector']:.1f}", _gib(most)]
        lines.append(_line(kind, "shoal", "", *cells, _gib([run["total"] for run in runs])))
    tables: list[str] = []
    for (kind, training), runs in rows.items():
        name = f"lance-ray {runs[0]['index']['index_type']}, training {training}"
        copy, build = ([run[what] for run in runs] for what in ("copy", "build"))
        size, most = runs[0]["bytes"] / runs[0]["rows"], [run["processes"][0]["unshared"] for run in runs]
        cells = [spread(copy, "{:.1f}"), spread(build, "{:.1f}"), f"{size:.1f}", _gib(most)]
        lines.append(_line(kind, name, *cells, _gib([run["total"] for run in runs])))
        tables += ["", f"{kind}, {name}:", "", *_differences("lance-ray's", runs[0]["recall"], runs[0]["over"])]
        bars += _lance_bars(rounds, kind, training)
    return [*lines, LANCE_NOTE, *tables]


def _autofaiss(rounds: Sequence[Row], bars: list[str]) -> list[str]:
    rows = _rows(rounds, "autofaiss")
    lines: list[str] = []
    for kind, runs in rows.items():
        versions = runs[0]["versions"]
        lines += ["", "## Beside autofaiss", "", ", ".join(f"{name} {number}" for name, number in versions.items()), ""]
        lines += _table("contender", "build, s", "largest process, GiB")
        ours = [found["build"][kind] for found in rounds if kind in found["autofaiss"]]
        for name, seconds, side in (
            ("shoal", [_seconds(run) for run in ours], ours),
            (runs[0]["key"], [run["build"] for run in runs], runs),
        ):
            most = _gib([run["processes"][0]["unshared"] for run in side])
            lines.append(_line(name, spread(seconds, "{:.1f}"), most))
        ratios = [their["build"] / _seconds(mine) for mine, their in zip(ours, runs, strict=True)]
        bars.append(_bar(f"{kind}: autofaiss's seconds over ours", "> 1", spread(ratios), median(ratios) > 1))
        lines += ["", *_differences("autofaiss's", runs[0]["recall"], runs[0]["over"])]
    return [*lines, AUTOFAISS_NOTE] if rows else []


def _lance_bars(rounds: Sequence[Row], kind: str, training: str) -> list[str]:
    pairs = [
        (found["build"][kind], found["lance"][kind, training]) for found in rounds if (kind, training) in found["lance"]
    ]
    name, bars = f"{kind}: lance-ray, training {training}", []
    for said, copied in (("", 0), (", its copy counted", 1)):
        ratios = [(their["build"] + copied * their["copy"]) / _seconds(run) for run, their in pairs]
        bars.append(_bar(f"{name}{said}: seconds over ours", "> 1", spread(ratios), median(ratios) > 1))
    for questions in ("held", "real"):
        least = min(
            over[0] for _, their in pairs for which, over in their["over"].items() if which.startswith(questions)
        )
        bars.append(_bar(f"{name}: recall@10 over theirs, {questions}, least", ">= 0", f"{least:+.4f}", least >= 0))
    return bars
