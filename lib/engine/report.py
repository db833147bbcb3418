"""The report of a run, as text: what is there, what this driver did, where the time went."""

import time
from collections.abc import Sequence

from ..cli.progress import Progress
from ..cli.units import format_duration
from ..errors import EXIT_QUARANTINED
from .executor import Outcome
from .parts import Part

STEPS = ("read", "tokenise", "encode", "write")


def exit_code(outcome: Outcome) -> int:
    return EXIT_QUARANTINED if outcome.quarantined else 0


def report(outcome: Outcome, output: str) -> str:
    lines = _output(outcome.parts, output) if outcome.parts else []
    if outcome.progress.counts["rows"]:
        lines += _this_run(outcome.progress)
    if nameless := outcome.progress.counts["without_id"]:
        lines.append(f"ids       {nameless:,} rows of this run have none: their id is null, or missing from the line")
    lines += [f"note      {note}" for note in outcome.notes]
    if outcome.elsewhere:
        missing = f"{outcome.elsewhere:,} shards of other slices"
        lines.append(f"MISSING   {missing}; whoever does the last one writes the manifest")
    if outcome.quarantined:
        lines.append(f"QUARANTINED {len(outcome.quarantined)} shards, listed in {output}/_quarantine.json:")
        lines += [f"  shard {number}: {reason}" for number, reason in list(outcome.quarantined.items())[:5]]
        lines.append("Mend the cause and start the same command again: only these shards are tried.")
    return "\n".join(lines)


def _output(parts: Sequence[Part], output: str) -> list[str]:
    """Lines about the output. Tokens, and texts that were cut, only where there were texts."""
    rows, errors, tokens = (sum(getattr(part, name) for part in parts) for name in ("rows", "errors", "tokens"))
    cut = f", {sum(part.truncated for part in parts):,} truncated" if tokens else ""
    first = f"output    {output}: {len(parts):,} parts, each audited, manifest written"
    lines = [first, f"rows      {rows:,} ({errors:,} kept with an error{cut})"]
    return [*lines, f"tokens    {tokens:,}"] if tokens else lines


def _this_run(progress: Progress) -> list[str]:
    """Lines about the work of this driver, and its time by step."""
    elapsed = max(time.monotonic() - progress.began, 1e-9)
    rows, tokens = progress.counts["rows"], progress.counts["tokens"]
    took, rate = f"{format_duration(elapsed)} ({elapsed:.1f} s", f"{rows / elapsed:,.0f} rows/s"
    total = sum(progress.seconds.values())
    busy = "  ".join(
        f"{each} {progress.seconds[each] / (total or 1.0):.0%}" for each in STEPS if each in progress.seconds
    )
    steps = f"time in   {busy}  (of {total:,.1f} busy seconds, all processes together)"
    if not tokens:
        return [f"this run  {rows:,} rows in {took})", f"speed     {rate}", steps]
    loaded = progress.worked_until - (progress.worked_from or progress.worked_until)
    waste = 1 - tokens / progress.counts["padded"] if progress.counts["padded"] else 0.0
    return [
        f"this run  {rows:,} rows, {tokens:,} tokens in {took}, {loaded:.1f} s of them with a model loaded)",
        f"speed     {rate}, {tokens / elapsed:,.0f} tokens/s",
        f"padding   0% (a padded batch of 32 in arrival order: {waste:.0%}); "
        f"equal texts and beginnings saved {1 - progress.counts['encoded'] / tokens:.0%} of the tokens",
        steps,
    ]
