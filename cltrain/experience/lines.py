"""The lines of a file of any size, as bytes: what is in them is for whoever reads them to judge."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from cltrain.errors import DataError

MAX_LINE_BYTES = 16 * 2**20
KEPT_BYTES = 64 * 2**10  # of a longer line
BOM = b"\xef\xbb\xbf"


def opened(file: Path) -> BufferedReader:
    try:
        stream = file.open("rb")
        head = stream.read(2)
        stream.seek(0)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    if head in (b"\xff\xfe", b"\xfe\xff"):
        stream.close()
        raise DataError(f"{file} is UTF-16: convert it first (iconv -f UTF-16 -t UTF-8)")
    return stream


def digest_of(file: Path) -> str:
    with opened(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def lines_of(stream: BufferedReader) -> Iterator[tuple[int, bytes, int]]:
    """(number from 1, bytes without the line end, size in bytes); of a line over MAX_LINE_BYTES only the beginning."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 2):
        number += 1
        size, last = len(raw), raw
        while not last.endswith(b"\n") and (last := stream.readline(MAX_LINE_BYTES)):
            raw, size = raw[:KEPT_BYTES], size + len(last)
        raw = raw.removeprefix(BOM) if number == 1 else raw
        stripped = raw.rstrip(b"\r\n")
        is_whole = size <= MAX_LINE_BYTES + 2
        size = len(stripped) if is_whole else size
        yield number, stripped if size <= MAX_LINE_BYTES else stripped[:KEPT_BYTES], size
