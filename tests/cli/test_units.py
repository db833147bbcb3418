"""Sizes and durations as people write and read them."""

import pytest

from lib.cli.units import format_bytes, format_duration, parse_bytes
from lib.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [("64GB", 64e9), ("64GiB", 64 * 2**30), ("500m", 5e8), (" 1.5 KiB ", 1536), ("7", 7), ("2tb", 2e12)],
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 i", "1.GB", "12xb"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """The message has the value and an example."""
    with pytest.raises(UsageError, match=r"is no size\. Write it as 64GB or 64GiB") as error:
        parse_bytes(text)
    assert repr(text) in str(error.value)


def test_sizes_are_written() -> None:
    assert [format_bytes(size) for size in (2**19, 3 * 2**30, 250.4 * 2**30)] == ["0.5 MiB", "3.00 GiB", "250 GiB"]


def test_durations_are_written() -> None:
    assert [format_duration(seconds) for seconds in (0.4, 123, 3723)] == ["0:00", "2:03", "1:02:03"]
