"""Search an index: python jobs/search_index.py --index index/ --input queries.jsonl --output hits/"""

import sys

import click

from lib.cli.options import command
from lib.engine.report import exit_code, report
from lib.index.search.config import SearchConfig
from lib.index.search.job import search

EPILOG = """\b
The shortest line: python jobs/search_index.py --index index/ --input queries.jsonl --output hits/
Exit codes: 0 every query has its passages, 1 error, 2 wrong command, 3 finished but some shards are quarantined."""


@command(SearchConfig, "search_index.py", EPILOG)
def main(config: SearchConfig) -> int:
    """Find each query's best passages in an index that build_index.py wrote. Stopped, the same command resumes."""
    outcome = search(config)
    click.echo(report(outcome, config.output))
    return exit_code(outcome)


if __name__ == "__main__":
    sys.exit(main())
