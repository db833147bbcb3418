"""The files of an input: listed completely, another tag after a change; on the local disk, on Ceph and on Swift."""

import os

import pytest

from lib.errors import StorageError
from lib.storage.filesystem import open_file
from lib.storage.folder import Folder
from lib.storage.listing import covers, current_tag, find
from tests.conftest import ONE_SERVER, misbehaving

MB = 1 << 20


def test_find_gives_files_in_order_without_hidden_ones(store):
    """A folder, a glob and a file are listed, sorted by path; names of which a part starts with `_` or `.` are no input."""
    for path in ("b.txt", "a/c.txt", "a/_d.txt", "_e/f.txt", "a/.g.txt"):
        folder, _, name = f"{store}/{path}".rpartition("/")
        Folder(folder).publish(name, b"xyz")

    def names(url: str) -> list[str]:
        return [file.path.split("/store/")[1] for file in find(url, {})]

    assert names(store) == ["a/c.txt", "b.txt"]
    assert names(f"{store}/*/*.txt") == ["a/c.txt"]
    assert names(f"{store}/b.txt") == ["b.txt"]
    assert names(f"{store}/none") == []
    assert {file.size for file in find(store, {})} == {3}


def test_links_are_followed(tmp_path):
    """Links to files and to folders are part of a corpus, once each; a link to nothing is an error."""
    (tmp_path / "store").mkdir()
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "store" / "a.txt").write_text("a")
    os.symlink(tmp_path / "store" / "a.txt", tmp_path / "in" / "linked.txt")
    os.symlink(tmp_path / "store", tmp_path / "in" / "folder")
    os.symlink(tmp_path / "in", tmp_path / "in" / "deep" / "above")

    for url in (tmp_path / "in", f"{tmp_path}/in/**"):
        assert [file.name for file in find(str(url), {})] == ["folder/a.txt", "linked.txt"]
    (file, _) = find(str(tmp_path / "in"), {})
    assert current_tag(file.path, {}) == (file.size, file.tag)
    os.symlink("/nowhere", tmp_path / "in" / "broken.txt")
    with pytest.raises(StorageError, match=r"broken\.txt is a link to nothing"):
        find(str(tmp_path / "in"), {})


@pytest.mark.parametrize("server", [ONE_SERVER], indirect=True)
@pytest.mark.parametrize("pattern", ["", "/**/*.txt", "/folder-1*/name-?.txt"])
def test_a_listing_under_errors_leaves_nothing_out(server, bucket, pattern, monkeypatch):
    """With 30 % of the requests answered 503, a folder or a glob gives the same files as without errors."""
    for number in range(30):
        Folder(f"{bucket}/in/folder-{number:02}").publish(f"name-{number % 3}.txt", b"x")
    expected = find(f"{bucket}/in{pattern}", {})
    assert len(expected) == (10 if "folder-1" in pattern else 30)

    with misbehaving(server, monkeypatch, error_rate=0.3) as proxy:
        for _ in range(100):
            assert find(f"{bucket}/in{pattern}", {}) == expected
            if proxy.errors > 2:
                return
    pytest.fail("fewer than three errors in a hundred listings")


def test_places_that_an_input_covers(tmp_path):
    """A place under the input's folder, or one that its glob matches, is covered; hidden places are not."""
    for url, place, covered in (
        ("data", "data/out", True),
        ("data", "data", True),
        ("data", "data-out", False),
        ("data", "data/_out", False),
        ("data/**/*.parquet", "data/out", True),
        ("data/*.parquet", "data/out", False),
        ("data/*", "data/out", True),
        ("data/**/*.jsonl", "data/out", False),
    ):
        assert covers(f"{tmp_path}/{url}", f"file://{tmp_path}/{place}", {}) is covered, (url, place)


NAMES = [
    "docs[1].jsonl",
    "a::b.jsonl",
    "a*b.jsonl",
    "what?.jsonl",
    "[",
    "x::s3",
    "#1.jsonl",
    "50%.jsonl",
    "é中.jsonl",
    "a b.jsonl",
]


def test_a_name_comes_before_a_pattern(store):
    """A file, or a folder, that exists under the very name is that file, whatever its letters mean in a pattern or a URL."""
    for name in NAMES:
        Folder(f"{store}/files").publish(name, name.encode())
        Folder(f"{store}/folders/{name}").publish("inside", b"two")
    everything = {file.path for file in find(store, {})}
    for name in NAMES:
        (file,) = find(f"{store}/files/{name}", {})
        (inside,) = find(f"{store}/folders/{name}", {})

        assert (file.name, inside.name) == (name, "inside")
        assert current_tag(file.path, {}) == (file.size, file.tag)
        with open_file(file.path, {}) as opened:
            assert opened.read() == name.encode()
        everything -= {file.path, inside.path}
    assert not everything


@pytest.mark.parametrize("size", [3, 11 * MB], ids=["in one request", "in several"])
def test_the_tag_changes_with_the_file(store, size):
    """The tag in the plan is the file's tag as long as the file is the same; an overwritten file has another one."""
    folder = Folder(store, {"default_block_size": 5 * MB})
    folder.publish("name", b"1" * size)
    planned = find(store, {})[0]

    assert current_tag(planned.path, {}) == (planned.size, planned.tag)
    folder.publish("name", b"2" * size)
    assert current_tag(planned.path, {}) != (planned.size, planned.tag)


def test_folder_markers_are_no_files(server, bucket):
    """Consoles make a folder by an empty object whose name ends in `/`: neither `list` nor `find` lists it."""
    for key in ("store/", "store/deeper/", "store/name"):
        server.client().put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"")

    assert Folder(f"{bucket}/store").list() == {"name": 0}
    assert [file.path for file in find(f"{bucket}/store", {})] == [f"{bucket}/store/name"]
