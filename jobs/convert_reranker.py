"""Free a reranker of its own code: python jobs/convert_reranker.py --model DIR --output DIR --reference-python PYTHON"""

import sys

from lib.cli.options import command
from lib.models.conversion.job import ConvertConfig, convert

EPILOG = """\b
The shortest line: python jobs/convert_reranker.py --model DIR --output DIR --reference-python envs/zhinao/bin/python
Exit codes: 0 written, 1 error, among them scores that differ, 2 wrong command."""


@command(ConvertConfig, "convert_reranker.py", EPILOG)
def main(config: ConvertConfig) -> int:
    """Write 360Zhinao's or bge's layerwise reranker as a plain classifier, if its scores are those of the original."""
    convert(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
