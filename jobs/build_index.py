"""Build an index: python jobs/build_index.py --input vectors/ --output index/"""

import sys

import click

from lib.cli.options import command
from lib.index.build.config import IndexConfig
from lib.index.build_job import build
from lib.index.estimate.forecast import forecast

EPILOG = """\b
The shortest line: python jobs/build_index.py --input vectors/ --output index/
Exit codes: 0 the index and its card are there, 1 error, 2 wrong command."""


@command(IndexConfig, "build_index.py", EPILOG)
def main(config: IndexConfig) -> int:
    """Turn vectors into a faiss index with measured recall. Stopped, the same command goes on; new input is added."""
    if config.dry_run:
        click.echo("\n".join(forecast(config)))
        return 0
    card = build(config)
    click.echo(
        f"{card['vectors']:,} vectors, {card['bytes_per_vector']:.1f} bytes each: {config.output.rstrip('/')}/README.md"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
