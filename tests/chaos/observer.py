"""A reader who lists the output all the time: what has a part's name is a whole part, at first sight and for good."""

import json
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tests.chaos.tally import Tally

SECONDS = 0.5  # between two listings
OPTIONS: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
S3_OPTIONS = {"config_kwargs": {"connect_timeout": 2, "read_timeout": 20, "retries": {"total_max_attempts": 1}}}


class Observer:
    """Run `watch` in a thread; `look` once more at the end."""

    def __init__(self, url: str, tally: Tally):
        self.tally = tally
        self.local = "://" not in url
        self.fs, self.path = fsspec.core.url_to_fs(url, **OPTIONS, **({} if self.local else S3_OPTIONS))
        self.tags: dict[str, str] = {}  # of parts seen whole
        self.rows: dict[str, int] = {}
        self.listings = self.unanswered = self.rewritten = self.partial = self.unfinished = 0

    def watch(self) -> None:
        while not self.tally.over.wait(SECONDS):
            self.look()

    def look(self) -> bool:
        """List and read what is new; False when the server did not answer, which is nobody's fault here."""
        try:
            entries = self._list()
            self.listings += 1
            parts = {name: _tag(entry) for name, entry in entries.items() if name.startswith("part-")}
            self._judge_names(entries, parts)
            for name, tag in parts.items():
                if self.tags.get(name) != tag:
                    self._read(name, tag)
            if "_manifest.parquet" in entries and (there := sum(self.rows.values())) != self.tally.rows:
                self.tally.fail(f"a manifest is listed beside {there} of {self.tally.rows} rows")
        except Exception as error:
            if isinstance(error, AssertionError | TypeError | AttributeError | LookupError):
                raise
            self.unanswered += 1
            return False
        self.tally.parts, self.tally.done = len(self.rows), sum(self.rows.values())
        return True

    def _list(self) -> dict[str, dict[str, Any]]:
        try:
            return {entry["name"].rsplit("/", 1)[-1]: entry for entry in self.fs.ls(self.path, detail=True)}
        except FileNotFoundError:
            return {}

    def _judge_names(self, entries: dict[str, Any], parts: dict[str, str]) -> None:
        for name in self.tags.keys() - parts.keys():
            self.tally.fail(f"{name} was listed and is not any more")
        hidden = [name for name in entries if name.startswith(".") and name.endswith(".unfinished")]
        self.unfinished = len(hidden)
        for name in entries.keys() - parts.keys() - (set(hidden) if self.local else set()):
            if not name.startswith("_"):
                self.tally.fail(f"{name!r} is listed in the output: neither a part nor a record")

    def _read(self, name: str, tag: str) -> None:
        try:
            data = self.fs.cat_file(f"{self.path}/{name}")
        except FileNotFoundError:
            self.partial += 1
            self.tally.fail(f"{name} is listed and cannot be read: not found")
            return
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            rows, said = file.read().num_rows, json.loads(file.metadata.metadata[b"shoal.part"])["rows"]
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            self.partial += 1
            self.tally.fail(f"{name} is listed and not whole ({len(data)} bytes): {error}")
            return
        if rows != said or self.rows.get(name, rows) != rows:
            self.tally.fail(f"{name} has {rows} rows, says {said}, had {self.rows.get(name)}")
        self.rewritten += name in self.tags
        self.tags[name], self.rows[name] = tag, rows


def _tag(entry: dict[str, Any]) -> str:
    return " ".join(str(entry.get(key)) for key in ("ETag", "LastModified", "ino", "mtime") if entry.get(key))
