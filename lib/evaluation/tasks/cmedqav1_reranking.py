"""CMedQAv1-reranking of C-MTEB: 1,000 medical questions with a hundred replies each. As mteb 2.26 has it."""

from . import Task

TASK = Task(
    name="CMedQAv1-reranking",
    kind="reranking",
    dataset="mteb/CMedQAv1-reranking",
    revision="f77f0345c9b6ac0a2447a3a71483d5b27393cb35",
    split="test",
    languages=("cmn-Hans",),
)
