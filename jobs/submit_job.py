"""Submit a job until it is done: python jobs/submit_job.py -- python jobs/embed_corpus.py --input s3://b/docs/ ..."""

import sys

import click

from lib.cli.options import command
from lib.engine.submit import SubmitConfig, submit_until_done

EPILOG = """\b
The shortest line: python jobs/submit_job.py -- python jobs/embed_corpus.py --input ... --output ... --model ...
Exit codes: those of the job; 1 too when it was stopped, fails three times in a row, or is not done in --hours."""


@command(SubmitConfig, "submit_job.py", EPILOG)
def main(config: SubmitConfig) -> int:
    """Submit a job to a cluster and follow it; when its head or its driver dies, submit it again, until it has ended well."""
    return submit_until_done(config, lambda text: click.echo(text, nl=False))


if __name__ == "__main__":
    sys.exit(main())
