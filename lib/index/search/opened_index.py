"""A finished index, opened for a search: its card, and the segments that its manifest names."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...engine.parts import MANIFEST as PARTS
from ...engine.parts import read_manifest
from ...errors import InputError
from ...storage.filesystem import absolute
from ...storage.fingerprint import fingerprint
from ...storage.folder import Folder
from ..build.layout import CARD, MANIFEST, ROWS, SEGMENTS
from ..build.segments_job import segments_of
from ..kinds import IndexKind, parse


@dataclass(frozen=True)
class OpenedIndex:
    """card: the index card. segments: of the manifest, each with `name`, `first`, `rows`, `vectors` and `bytes`."""

    folder: Folder
    card: Mapping[str, Any]
    segments: tuple[Mapping[str, Any], ...]

    @cached_property
    def kind(self) -> IndexKind:
        return parse(self.card["kind"])

    @property
    def encoder(self) -> Mapping[str, Any]:
        """The model of the vectors and its options, where the embed job wrote them."""
        return self.card["encoder"]

    @property
    def vectors(self) -> int:
        return sum(segment["vectors"] for segment in self.segments)

    @property
    def identity(self) -> dict[str, Any]:
        """Differs from that of any other index, and of the same index before it grew."""
        names = sorted(segment["name"] for segment in self.segments)
        return {"vectors": self.vectors, "segments": len(names), "names": fingerprint(names)}


def open_index(url: str, storage: Mapping[str, Any]) -> OpenedIndex:
    """Raises InputError where there is no finished index, or files of it are missing."""
    folder = Folder(absolute(url), dict(storage))
    card, manifest = (folder.read_json(name) for name in (CARD, MANIFEST))
    if card is None or manifest is None:
        raise InputError(
            f"no finished index at {folder.url}: it has no {CARD}. Start the command again that builds it, or correct --index"
        )
    index = OpenedIndex(folder, card, tuple(segments_of(manifest)))
    _refuse_missing_files(index)
    return index


def _refuse_missing_files(index: OpenedIndex) -> None:
    """Raises InputError for files of the index that are missing or incomplete, by a listing of each of its folders."""
    rows, segments = (index.folder.below(name) for name in (ROWS, SEGMENTS))
    parts = {part.part: part.bytes for part in read_manifest(rows)} or {PARTS: -1}
    for folder, planned in ((segments, {each["name"]: each["bytes"] for each in index.segments}), (rows, parts)):
        sizes = folder.list()
        if lost := sorted(name for name, size in planned.items() if sizes.get(name) != size):
            raise InputError(
                f"{len(lost):,} of {len(planned):,} files of the index in {folder.url} are gone or not whole, {lost[0]} the first. "
                "Delete what is left of them and start the command again that built the index: it makes them anew"
            )
