"""The cluster's images: dependencies only, pinned by the repository's files, and no root."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)


@cache
def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, those of the stage that it begins from included."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, words = line.split(maxsplit=1)
        if instruction == "FROM":
            source, _, name = words.split()
            found[name] = list(found.get(source, ()))
        found[name].append((instruction, words))
    return found


def of(instruction: str) -> list[str]:
    """What the file says after an instruction, wherever it stands."""
    return sorted({words for lines in stages().values() for name, words in lines if name == instruction})


@pytest.mark.skipif(not HADOLINT, reason="hadolint is not there")
def test_hadolint_has_nothing_to_say():
    """The usual mistakes of Dockerfiles, by the linter that knows them."""
    done = subprocess.run([HADOLINT, "--no-color", DOCKERFILE], capture_output=True, text=True)

    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_there_is_an_image_for_each_kind_of_node():
    """The targets that manifests and guide name."""
    assert set(stages()) == {"base", "cpu", "cuda"}


def test_the_base_is_named_by_its_tag():
    """A Python that the project supports, of a named Debian, and each target begins from the same one."""
    bases = {words.split()[0] for words in of("FROM")} - set(stages())
    (image,) = bases
    name, tag = image.split(":")
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]

    assert name == "python"
    assert lowest == f">={tag.split('-')[0]}"
    assert "-" in tag


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_no_image_runs_as_root(target):
    """The last instruction is the user: one that was made, and the number that the manifests give pods."""
    lines = stages()[target]
    made = next(words for instruction, words in lines if instruction == "RUN" and "useradd" in words)
    number = re.search(r"--uid (\d+)", made)[1]
    manifest = (ROOT / "cluster" / "kuberay" / "raycluster.yaml").read_text()

    assert lines[-1] == ("USER", number)
    assert set(re.findall(r"runAsUser: (\d+)", manifest)) == {number}
    assert int(number) > 0


def test_nothing_of_the_project_is_in_an_image():
    """Only the two files that name dependencies are copied, they are there, and docker is let see nothing else."""
    copied = {file for words in of("COPY") for file in words.split()[:-1]}
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    assert copied == {"pyproject.toml", "constraints.txt"}
    assert all((ROOT / file).is_file() for file in copied)
    assert of("ADD") == []
    assert ignored[0] == "*"
    assert {line.removeprefix("!") for line in ignored[1:]} == copied


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_pip_is_held_to_the_constraints(target):
    """Every installation is pinned and keeps no cache, and no registry is written down."""
    installs = [words for instruction, words in stages()[target] if instruction == "RUN" and "pip install" in words]

    assert installs == ["pip install --no-cache-dir -c constraints.txt -r requirements.txt"]
    assert not re.search(r"\w://|index-url", DOCKERFILE.read_text().replace("s3://", ""))


def test_requirements_are_those_of_the_project(tmp_path):
    """What is installed is what pyproject.toml names, each with its version in constraints.txt; the head has a job server."""
    command = next(words for words in of("RUN") if words.startswith("python -c"))
    _, _, code, _, target = shlex.split(command)
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {canonical(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    asked = {canonical(re.match(r"[\w.-]+", line)[0]) for line in said.splitlines()}

    assert target == "requirements.txt"
    assert set(said.splitlines()) >= set(project["dependencies"])
    assert asked - pinned <= {"boto3"}, "boto3's version follows from botocore's"
    assert "botocore" in pinned
    assert re.search(r"^ray\[default,data,train\]", said, re.MULTILINE)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
