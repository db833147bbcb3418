"""Folders as objects: complete, or absent."""

import json

import pytest

from lib.errors import ModelError, StorageError
from lib.models.encoder_options import ModelOptions, resolve_encoder
from lib.storage import directory
from lib.storage.folder import Folder
from tests.conftest import use


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    (folder / directory.FILES).write_text("an old list, which must not come along")
    return folder


def test_an_upload_is_downloaded(source, store, tmp_path):
    """Every file below the folder comes back under its name, from every store; the list of files is written last, and by us."""
    target = Folder(f"{store}/model")
    directory.upload_directory(source, target)
    back = directory.download_directory(target, tmp_path / "cache")

    assert directory.is_complete(target)
    assert sorted(json.loads(target.read(directory.FILES))) == ["1_Pooling/config.json", "config.json"]
    assert (back / "1_Pooling" / "config.json").read_text() == '{"pooling_mode": "cls"}'
    directory.remove_directory(target)
    assert not directory.is_complete(target)


def test_other_content_is_another_copy(source, tmp_path):
    """A folder that was uploaded again is not mistaken for the copy of the earlier one."""
    target, cache = Folder(str(tmp_path / "target")), tmp_path / "cache"
    directory.upload_directory(source, target)
    first = directory.download_directory(target, cache)
    (source / "config.json").write_text("[]")
    directory.upload_directory(source, target)

    assert directory.download_directory(target, cache) != first
    assert (directory.download_directory(target, cache) / "config.json").read_text() == "[]"


def test_half_a_folder_is_refused(source, tmp_path):
    """Without its list nothing is read; a file with other content than listed, or outside of the folder, is refused."""
    target = Folder(str(tmp_path / "target"))
    with pytest.raises(FileNotFoundError):
        directory.download_directory(target, tmp_path / "cache")
    directory.upload_directory(source, target)
    target.publish("config.json", b"other")
    with pytest.raises(StorageError, match=r"config\.json is not what"):
        directory.download_directory(target, tmp_path / "cache")
    target.publish(directory.FILES, json.dumps({"../outside": {"sha256": ""}}).encode())
    with pytest.raises(StorageError, match="outside"):
        directory.download_directory(target, tmp_path / "cache")


def test_a_model_is_read_from_a_store(build, ceph, tmp_path, monkeypatch):
    """`--model s3://...` takes the model of a fine-tuning; an incomplete folder is an error that names it."""
    use(ceph.environment(), monkeypatch)
    monkeypatch.setenv("SHOAL_MODELS", str(tmp_path / "models"))
    ceph.create_bucket("models")
    directory.upload_directory(build("bert"), Folder("s3://models/tiny"))

    assert resolve_encoder(ModelOptions(model="s3://models/tiny")).spec.dim == 32
    with pytest.raises(ModelError, match="s3://models/nothing is not the folder of a whole model"):
        resolve_encoder(ModelOptions(model="s3://models/nothing"))
