"""Fine-tune a model: python jobs/finetune_model.py --data pairs.jsonl --model BAAI/bge-base-zh-v1.5 --output run/"""

import sys

import click

from lib.cli.options import command
from lib.training.config import FinetuneConfig
from lib.training.job import finetune

EPILOG = """\b
The shortest line: python jobs/finetune_model.py --data pairs.jsonl --model DIR --output run/
Exit codes: 0 the model is in OUTPUT/model, 1 error, 2 wrong command."""


@command(FinetuneConfig, "finetune_model.py", EPILOG)
def main(config: FinetuneConfig) -> int:
    """Train an embedding model or a reranker on pairs. Stopped, the same command goes on where it was."""
    done = finetune(config)
    for row in done.scores:
        if "measure" in row:
            click.echo(f"step {row['step']:>7}  {row['measure']} {row[row['measure']]:.4f}")
    click.echo(f"model     {done.model}  (step {done.best} of {done.steps}, last loss {done.loss:.4f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
