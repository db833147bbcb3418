"""Compare evaluated models: python jobs/compare_models.py --input evaluation/"""

import sys

import click

from lib.cli.options import command
from lib.evaluation.compare import CompareConfig, compare

EPILOG = """\b
The shortest line: python jobs/compare_models.py --input evaluation/
Exit codes: 0 both files are written, 1 error, 2 wrong command."""


@command(CompareConfig, "compare_models.py", EPILOG)
def main(config: CompareConfig) -> int:
    """Put the results of evaluations side by side, beside what was published: Markdown, and one HTML page with bars."""
    for url in compare(config):
        click.echo(url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
