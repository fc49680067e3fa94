"""Lines of text files that people write."""

from __future__ import annotations

import re
from pathlib import Path

from sfgrpo.errors import ConfigError

LINE_END = re.compile(r"\r\n|\n|\r")


def read_lines(path: Path, cure: str = "give another file") -> list[tuple[int, str]]:
    """Read the lines of a UTF-8 file that are not blank, each with its number from 1.

    Lines end as Unix, Windows or old Macs end them, and nowhere else: U+2028 and its like stand inside a line. A
    byte-order mark is no part of the text.

    Raises:
        ConfigError: the file cannot be read, where `cure` says what to do, or is not UTF-8.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        # A pipe or a device might never end.
        raise ConfigError(f"{path}: is no regular file; {cure}")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; {cure}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); make it a readable file, or {cure}") from error
    lines = enumerate(LINE_END.split(_decoded(path, content)), start=1)
    # Files that were joined to one have the mark inside.
    return [(number, text) for number, line in lines if (text := line.removeprefix("\ufeff")).strip()]


def _decoded(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Its positions count from after a byte-order mark.
        line, byte = _line_at(error.object[: error.start].decode()), error.object[error.start]
        raise ConfigError(f"{path}:{line}: byte {byte:#04x} is not UTF-8; save the file as UTF-8") from error
    if "\0" in text:
        line = _line_at(text[: text.index("\0")])
        raise ConfigError(f"{path}:{line}: holds a NUL, as UTF-16 text does; save the file as UTF-8")
    return text


def _line_at(text_before: str) -> int:
    """Return the number of the line that follows a text."""
    return len(LINE_END.findall(text_before)) + 1
