"""What cluster/README.md promises is there: commands, files, and the test behind each claim on security."""

import json
import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

import pytest
import yaml
from s3fs import S3FileSystem

from lib.engine.lease import BEAT
from lib.storage.filesystem import open_file
from tests.repository.test_docs import parsed

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "cluster" / "README.md"
TEXT = GUIDE.read_text()
CLAIMS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
SUBMIT = "jobs/submit_job.py"


def commands() -> Iterator[tuple[str, str]]:
    """The job and the words of each command, and of each command that another submits."""
    for line in TEXT.replace("\\\n", " ").splitlines():
        for job, words in re.findall(r"python (jobs/\w+\.py) (.+?)(?=python jobs/|&?$)", line):
            yield job, words + "python" * (job == SUBMIT)


COMMANDS = list(commands())


@pytest.mark.parametrize(("job", "words"), COMMANDS)
def test_every_command_is_understood(job, words):
    """Each job of the guide, submitted or not, has options that there are, and an output that the bucket's policy allows."""
    options = parsed(job, words)
    if job == SUBMIT:
        return
    policy = json.loads((ROOT / "cluster" / "s3-policy.json").read_text())["Statement"]
    writes = next(each for each in policy if "s3:PutObject" in each["Action"])
    folder = writes["Resource"].replace("arn:aws:s3:::FILL-IN/", "s3://BUCKET/").rstrip("*")

    assert options["output"].startswith(folder)


def test_the_guide_has_commands():
    """The three platforms, a forecast, and two queues."""
    assert [job for job, _ in COMMANDS].count("jobs/embed_corpus.py") == 4
    assert [job for job, _ in COMMANDS].count(SUBMIT) == 3


def test_two_queues_share_one_plan():
    """The commands of the example differ in slice, label and workers alone, their slices are the whole, and there are such nodes."""
    queues = [parsed(job, words) for job, words in COMMANDS if "--slice" in words]
    types = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())["available_node_types"].values()
    labels = {f"{key}={value}" for each in types for key, value in each.get("labels", {}).items()}
    own = [(each.pop("slice"), each.pop("worker_label"), each.pop("max_workers")) for each in queues]

    assert [share for share, *_ in own] == ["1-3/4", "4/4"]
    assert {word for _, words, _ in own for word in words} <= labels
    assert queues[0] == queues[1]


def test_files_are_there():
    """Every file that the guide links or names exists, and so do the labels by which kubectl chooses manifests."""
    links = {GUIDE.parent / link for link in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)}
    names = {ROOT / name for name in re.findall(r"\b(?:cluster|benchmarks|docs)/[\w/-]+\.\w+", TEXT)}
    manifests = "".join(path.read_text() for path in (ROOT / "cluster" / "kuberay").glob("*.yaml"))

    assert links | names
    assert [str(path) for path in links | names if not path.exists()] == []
    for label in re.findall(r"-l shoal=(\w+)", TEXT):
        assert f"labels: {{shoal: {label}}}" in manifests


@pytest.mark.parametrize(("file", "name"), CLAIMS)
def test_a_claim_on_security_has_its_test(file, name):
    """The test that a row of the table names is there, and states a requirement."""
    assert re.search(rf'^def {name}\(.*\n    """', (ROOT / file).read_text(), re.MULTILINE)


def test_every_row_on_security_is_shown():
    """No row claims without naming a test, or the row above it."""
    table = TEXT.split("## Security")[1].split("```")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]

    assert len(rows) >= 8
    assert all("`tests/" in row or row.endswith("| the same |") for row in rows)


def test_figures_follow_from_each_other():
    """Hours and dollars of the example, what a lost worker costs, and requests a second, computed again."""
    hours = 1e9 * 150 / (500_000 * 16 * 3600)
    shards = 2000 * 500_000 / (65_536 * 150)

    assert f"= {hours:.1f} hours, and at $2.50 a GPU-hour ${hours * 16 * 2.5:.0f}." in TEXT
    assert f"65,536 x 150 / 500,000 = {65_536 * 150 / 500_000:.0f} s" in TEXT
    assert f"end {shards:.0f} shards a second: some {round(shards * 5, -1):.0f} writes" in TEXT
    assert 3500 * 2000 > 2000 * 500_000 / 150, "shards a second x rows a shard, at the limit"


def test_lines_are_short():
    """As in the other pages."""
    assert [line for line in TEXT.splitlines() if len(line) > 150] == []


def test_what_is_said_of_the_store_is_so():
    """Where an upload is cut, and how often a driver writes beside its shards."""
    assert signature(S3FileSystem._pipe_file).parameters["chunksize"].default == 50 << 20
    assert signature(open_file).parameters["buffering"].default == 8 << 20
    assert f"every {BEAT:.0f} s lists a folder" in TEXT
