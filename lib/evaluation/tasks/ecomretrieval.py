"""EcomRetrieval of C-MTEB: 1,000 queries of an online shop, 100,902 product titles. As mteb 2.26 has it."""

from . import Task

TASK = Task(
    name="EcomRetrieval",
    dataset="mteb/EcomRetrieval",
    revision="fa705ce5418e91636b1eaeaf43f34c15aa3f5a8a",
    split="dev",
    ignore_identical_ids=True,
    languages=("cmn-Hans",),
)
