"""CovidRetrieval of C-MTEB: 949 questions on COVID-19, 100,001 news articles. As mteb 2.26 has it."""

from . import Task

TASK = Task(
    name="CovidRetrieval",
    dataset="mteb/CovidRetrieval",
    revision="9c6dc4b276bb47c3ff725bbc5ffcafd56dded38b",
    split="dev",
    languages=("cmn-Hans",),
)
