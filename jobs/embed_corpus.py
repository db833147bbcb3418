"""Embed a corpus: python jobs/embed_corpus.py --input docs/ --output vectors/ --model BAAI/bge-m3"""

import sys

import click

from lib.cli.options import command
from lib.embedding.config import EmbedConfig
from lib.embedding.job import dry_run, embed
from lib.engine.report import exit_code, report

EPILOG = """\b
The shortest line: python jobs/embed_corpus.py --input docs/ --output vectors/ --model BAAI/bge-m3
Exit codes: 0 every row is there, 1 error, 2 wrong command, 3 finished but some shards are quarantined."""


@command(EmbedConfig, "embed_corpus.py", EPILOG)
def main(config: EmbedConfig) -> int:
    """Turn every row of a corpus into a vector, exactly once. Stopped at any moment, the same command goes on."""
    if config.run.dry_run:
        click.echo("\n".join(dry_run(config).lines(config.run.price_per_hour)))
        return 0
    outcome = embed(config)
    click.echo(report(outcome, config.run.output))
    return exit_code(outcome)


if __name__ == "__main__":
    sys.exit(main())
