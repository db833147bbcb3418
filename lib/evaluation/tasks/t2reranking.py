"""T2Reranking of C-MTEB: 5,908 web search queries with 2 to 335 candidates each. As mteb 2.26 has it."""

from . import Task

TASK = Task(
    name="T2Reranking",
    kind="reranking",
    dataset="mteb/T2Reranking",
    revision="a34fe6bc0dff185af1228e49a0f6fb1de1565627",
    split="dev",
    languages=("cmn-Hans",),
)
