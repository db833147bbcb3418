"""MMarcoRetrieval of C-MTEB: MS MARCO's development queries in Chinese: 6,980, and 106,813 passages. As mteb 2.26 has it."""

from . import Task

TASK = Task(
    name="MMarcoRetrieval",
    dataset="mteb/MMarcoRetrieval",
    revision="4940a7b26bf53463cfe3435bb8e201963e9c31ae",
    split="dev",
    ignore_identical_ids=True,
    languages=("cmn-Hans",),
)
