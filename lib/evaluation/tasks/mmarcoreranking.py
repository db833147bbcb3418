"""MMarcoReranking of C-MTEB: 100 queries of MS MARCO in Chinese with a thousand candidates each. As mteb 2.26 has it."""

from . import Task

TASK = Task(
    name="MMarcoReranking",
    kind="reranking",
    dataset="mteb/MMarcoReranking",
    revision="91c0f9d5cbd4cdc7ecd7039c5c2e57740cb62b00",
    split="dev",
    languages=("cmn-Hans",),
)
