"""Folders as objects: whole or not there."""

import json

import pytest
from conftest import use

from lib import trees
from lib.encoding import ModelOptions, resolve
from lib.errors import ModelError, StorageError
from lib.storage import Folder


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    (folder / trees.FILES).write_text("an old list, which must not come along")
    return folder


def test_what_went_up_comes_down(source, store, tmp_path):
    """Every file below the folder, under the same name, on every store; the list of files comes last and is ours."""
    target = Folder(f"{store}/model")
    trees.upload(source, target)
    back = trees.download(target, tmp_path / "cache")

    assert trees.is_whole(target)
    assert sorted(json.loads(target.read(trees.FILES))) == ["1_Pooling/config.json", "config.json"]
    assert (back / "1_Pooling" / "config.json").read_text() == '{"pooling_mode": "cls"}'
    trees.remove(target)
    assert not trees.is_whole(target)


def test_other_content_is_another_copy(source, tmp_path):
    """A folder that was uploaded again is not mistaken for the copy of the earlier one."""
    target, cache = Folder(str(tmp_path / "target")), tmp_path / "cache"
    trees.upload(source, target)
    first = trees.download(target, cache)
    (source / "config.json").write_text("[]")
    trees.upload(source, target)

    assert trees.download(target, cache) != first
    assert (trees.download(target, cache) / "config.json").read_text() == "[]"


def test_half_a_folder_is_none(source, tmp_path):
    """Without its list nothing is read; a file that is not what the list says, or lies outside, is refused."""
    target = Folder(str(tmp_path / "target"))
    with pytest.raises(FileNotFoundError):
        trees.download(target, tmp_path / "cache")
    trees.upload(source, target)
    target.publish("config.json", b"other")
    with pytest.raises(StorageError, match=r"config\.json is not what"):
        trees.download(target, tmp_path / "cache")
    target.publish(trees.FILES, json.dumps({"../outside": {"sha256": ""}}).encode())
    with pytest.raises(StorageError, match="outside"):
        trees.download(target, tmp_path / "cache")


def test_a_model_is_read_from_a_store(build, ceph, tmp_path, monkeypatch):
    """`--model s3://...` takes what a fine-tuning left; a folder that is no whole model is told."""
    use(ceph.environment(), monkeypatch)
    monkeypatch.setenv("SHOAL_MODELS", str(tmp_path / "models"))
    ceph.create_bucket("models")
    trees.upload(build("bert"), Folder("s3://models/tiny"))

    assert resolve(ModelOptions(model="s3://models/tiny")).spec.dim == 32
    with pytest.raises(ModelError, match="s3://models/nothing is not the folder of a whole model"):
        resolve(ModelOptions(model="s3://models/nothing"))
