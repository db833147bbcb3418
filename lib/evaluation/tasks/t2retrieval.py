"""T2Retrieval of C-MTEB: 22,812 web search queries, 118,605 passages. As mteb 2.26 has it."""

from . import Task

TASK = Task(
    name="T2Retrieval",
    dataset="mteb/T2Retrieval",
    revision="cf778c0ea4168ec5174a34d888d6453e4cde9222",
    split="dev",
    ignore_identical_ids=True,
    languages=("cmn-Hans",),
)
