"""Score pairs: python jobs/rerank_pairs.py --input pairs/ --output scores/ --model BAAI/bge-reranker-v2-m3"""

import sys

import click

from lib.cli.options import command
from lib.engine.report import exit_code, report
from lib.reranking.config import RerankConfig
from lib.reranking.job import dry_run, rerank

EPILOG = """\b
The shortest line: python jobs/rerank_pairs.py --input pairs/ --output scores/ --model BAAI/bge-reranker-v2-m3
Exit codes: 0 every row is there, 1 error, 2 wrong command, 3 finished but some shards are quarantined."""


@command(RerankConfig, "rerank_pairs.py", EPILOG)
def main(config: RerankConfig) -> int:
    """Turn every pair of query and passage into a score, exactly once. Stopped at any moment, the same command goes on."""
    if config.run.dry_run:
        click.echo("\n".join(dry_run(config).lines(config.run.price_per_hour)))
        return 0
    outcome = rerank(config)
    click.echo(report(outcome, config.run.output))
    return exit_code(outcome)


if __name__ == "__main__":
    sys.exit(main())
