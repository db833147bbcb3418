"""Evaluate a model: python jobs/evaluate_model.py --task T2Retrieval --output evaluation/ --model BAAI/bge-m3"""

import sys

import click

from lib.cli.options import command
from lib.evaluation.config import EvaluateConfig
from lib.evaluation.job import dry_run, evaluate

EPILOG = """\b
The shortest line: python jobs/evaluate_model.py --dataset DIR --output evaluation/ --model BAAI/bge-m3
Exit codes: 0 every task has its result, 1 error, 2 wrong command."""


@command(EvaluateConfig, "evaluate_model.py", EPILOG)
def main(config: EvaluateConfig) -> int:
    """Score an embedding model, a reranker or both on retrieval and reranking tasks. Stopped, the same command goes on."""
    if config.dry_run:
        click.echo("\n".join(dry_run(config)))
        return 0
    for result in evaluate(config):
        low, high = result.intervals[result.main_score]
        place = f"{config.output.rstrip('/')}/results/{result.system}/{result.task}.md"
        click.echo(f"{result.task:<20} {result.main_score} {result.main:.4f} ({low:.4f} - {high:.4f})  {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
