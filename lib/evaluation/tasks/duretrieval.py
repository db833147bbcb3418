"""DuRetrieval of C-MTEB: 2,000 web search queries, some with several of the 100,001 passages relevant. As mteb 2.26 has it."""

from . import Task

TASK = Task(
    name="DuRetrieval",
    dataset="mteb/DuRetrieval",
    revision="313c81b51311893c8fd09ca432f96b841ed0ebb3",
    split="dev",
    languages=("cmn-Hans",),
)
