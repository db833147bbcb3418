"""The live line: drawn over on a terminal with the driver's messages above it, repeated in a log."""

import io
import logging
import re
import subprocess
import sys
import time

import pytest

from lib.cli import options, progress
from lib.cli.progress import LiveLine, Progress

REDRAWN = "\r\x1b[2K"
WIDE = "COLUMNS", "200"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LIVE_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(*WIDE)


def wait_for(stream: io.StringIO, text: str, count: int = 1) -> None:
    deadline = time.monotonic() + 30
    while stream.getvalue().count(text) < count:
        assert time.monotonic() < deadline, stream.getvalue()
        time.sleep(0.01)


def show(stream: io.StringIO, count: int = 3) -> str:
    """Return the text that a run of two shards writes until its line was written `count` times."""
    run = Progress(2, stream=stream)
    with run.shown():
        run.add({"rows": 10}, {}, None)
        wait_for(stream, "1/2 shards", count)
    return stream.getvalue()


def test_a_log_gets_plain_lines() -> None:
    """Every line is whole, without a character that only a terminal understands."""
    lines = show(io.StringIO()).splitlines()

    assert len(lines) >= 3
    assert all(re.fullmatch(r"1/2 shards  [\d,]+ rows/s  ETA 0:00", line) for line in lines)


@pytest.mark.parametrize("kind", ["dumb", "unknown"])
def test_a_terminal_that_cannot_redraw_gets_plain_lines(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor's terminal shows lines, and no codes."""
    monkeypatch.setenv("TERM", kind)

    assert "\x1b" not in show(Terminal())


def test_a_terminal_shows_one_line_that_is_removed_at_the_end() -> None:
    """The line is drawn over with a bar, ends without a trace, and leaves the cursor visible all the while."""
    written = show(Terminal())

    assert written.count(REDRAWN) >= 3
    assert "━" in written
    assert written.endswith("\x1b[1A\x1b[2K")
    assert written.index("\x1b[?25l") < written.index("\x1b[?25h") < written.index("1/2 shards")


def test_messages_stand_above_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of the driver takes the line's place, whole and unstyled, and the line is drawn again below it."""
    terminal, message = Terminal(), f"read [bold]{'/a/long/path' * 30} 12"
    monkeypatch.setattr(sys, "stderr", terminal)
    options.show_messages()
    live = LiveLine(lambda: "the line", lambda: 0.5)
    live.start()
    wait_for(terminal, "the line", 2)
    logging.getLogger("shoal").info(message)
    live.stop()

    assert f"{REDRAWN}{message}\n" in terminal.getvalue()
    assert "the line" in terminal.getvalue().partition(message)[2]
    assert sys.stderr is terminal


def test_the_line_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is too long is cut: a line that wraps could not be drawn over."""
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    live = LiveLine(lambda: "word " * 20, lambda: 0.5, terminal)
    live.start()
    wait_for(terminal, "word", 20)
    live.stop()
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())

    assert max(len(line) for line in re.split(r"[\r\n]", plain)) <= 40


def test_an_interrupted_run_leaves_the_standard_error_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is removed, and what is written next goes to the terminal itself."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def interrupted() -> None:
        with Progress(2).shown():
            wait_for(terminal, "0/2 shards")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sys.stderr is terminal


def test_a_log_does_without_rich() -> None:
    """It is imported for a terminal only; matplotlib for a page only."""
    program = "import sys, lib.cli.progress, lib.cli.charts\nprint({'rich', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"


def test_rates_are_of_this_driver_alone() -> None:
    """Shards that an earlier driver finished count as done, and not for the time that is left."""
    run = Progress(10, done=6)
    with run.shown():
        pass
    assert run.line() == "6/10 shards  0 rows/s  ETA ?"
    run.began = time.monotonic() - 10
    run.add({"rows": 2000, "tokens": 50_000, "errors": 3}, {"read": 1.0, "encode": 3.0}, None)
    run.failures = 1

    assert re.fullmatch(
        r"7/10 shards  (200|199) rows/s  [45],\d{3} tokens/s  ETA 0:30  3 bad rows kept  1 tries failed", run.line()
    )
    assert run.fraction() == 0.7
    assert run.seconds == {"read": 1.0, "encode": 3.0}
