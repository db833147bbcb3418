"""The report of a run, as text: what is there, what this driver did, where the time went."""

import time

from .errors import EXIT_QUARANTINED
from .progress import duration
from .sharded import Outcome


def exit_code(outcome: Outcome) -> int:
    return EXIT_QUARANTINED if outcome.quarantined else 0


def report(outcome: Outcome, output: str) -> str:
    """Several lines, without a line end."""
    progress = outcome.progress
    lines = []
    if outcome.parts:
        totals = {n: sum(getattr(part, n) for part in outcome.parts) for n in ("rows", "errors", "truncated", "tokens")}
        lines.append(f"output    {output}: {len(outcome.parts):,} parts, each audited, manifest written")
        lines.append(
            f"rows      {totals['rows']:,} ({totals['errors']:,} kept with an error, {totals['truncated']:,} truncated)"
        )
        lines.append(f"tokens    {totals['tokens']:,}")
    if progress.rows:
        elapsed = max(time.monotonic() - progress.began, 1e-9)
        waste = 1 - progress.tokens / progress.padded if progress.padded else 0.0
        busy = "  ".join(f"{stage} {share:.0%}" for stage, share in progress.shares().items())
        total = sum(progress.seconds.values())
        lines += [
            f"this run  {progress.rows:,} rows, {progress.tokens:,} tokens in {duration(elapsed)} ({elapsed:.1f} s, "
            f"{progress.worked_until - (progress.worked_from or progress.worked_until):.1f} s of them with a model loaded)",
            f"speed     {progress.rows / elapsed:,.0f} rows/s, {progress.tokens / elapsed:,.0f} tokens/s",
            f"padding   0% (a padded batch of 32 in arrival order: {waste:.0%}); "
            f"equal texts and beginnings saved {1 - progress.encoded / max(progress.tokens, 1):.0%} of the tokens",
            f"time in   {busy}  (of {total:,.1f} busy seconds, all processes together)",
        ]
    lines += [f"note      {note}" for note in outcome.notes]
    if outcome.elsewhere:
        lines.append(
            f"MISSING   {outcome.elsewhere:,} shards of other slices; whoever does the last one writes the manifest"
        )
    if outcome.quarantined:
        lines.append(f"QUARANTINED {len(outcome.quarantined)} shards, listed in {output}/_quarantine.json:")
        lines += [f"  shard {number}: {reason}" for number, reason in list(outcome.quarantined.items())[:5]]
        lines.append("Mend the cause and start the same command again: only these shards are tried.")
    return "\n".join(lines)
