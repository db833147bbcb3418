"""CMedQAv2-reranking of C-MTEB: 1,000 medical questions with a hundred replies each, second version. As mteb 2.26 has it."""

from . import Task

TASK = Task(
    name="CMedQAv2-reranking",
    kind="reranking",
    dataset="mteb/CMedQAv2-reranking",
    revision="01399b6956a4c6bf9edc5b6b90e176aeeb399686",
    split="test",
    languages=("cmn-Hans",),
)
