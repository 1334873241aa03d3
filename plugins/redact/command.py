"""`llm-os redact`: a text without its personal data, or what was found in it, or how well it is found."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from llm_os import RequestError
from llm_os.plugins.redact import figures as measured
from llm_os.plugins.redact.finder import Finder
from llm_os.plugins.redact.mapping import Mapping
from llm_os.plugins.redact.options import Options

MAX_BYTES = 64 * 2**20


def redact(file: Path | None = None, *, json: bool = False, figures: bool = False, presidio: bool = False) -> int:
    """Print a text with placeholders for the personal data in it.

    Parameters
    ----------
    file
        The text, in UTF-8. Without it, what comes on stdin.
    json
        Print one object instead: text, and spans with start, end, kind, value and placeholder.
    figures
        The file is a labelled sample ({"text": ..., "spans": [[start, end, kind], ...]} on each line): print precision,
        recall and F1 of each kind.
    presidio
        Look with presidio's recognizers too (pip install "llm-os-runtime[presidio]").
    """
    finder = Finder(Options(recognizer="presidio" if presidio else "patterns"))
    if figures:
        if file is None:
            raise RequestError("--figures needs the file with the labelled sample")
        print(measured.table(measured.measure(measured.read(_small(file)), finder.find)))
        return 0
    text = _read(file)
    mapping = Mapping(finder)
    redacted = mapping.redact(text)
    if json:
        spans = [
            {"start": span.start, "end": span.end, "kind": span.kind, "value": value, "placeholder": placeholder}
            for span, value, placeholder in mapping.found
        ]
        print(msgspec.json.encode({"text": redacted, "spans": spans}).decode())
    else:
        sys.stdout.write(redacted)
    return 0


def _read(file: Path | None) -> str:
    try:
        raw = sys.stdin.buffer.read(MAX_BYTES + 1) if file is None else _small(file).read_bytes()
        if len(raw) > MAX_BYTES:
            raise RequestError(f"the text is larger than {MAX_BYTES} bytes; cut it")
        return raw.decode()
    except UnicodeDecodeError as error:
        name = file or "the text on stdin"
        raise RequestError(f"{name} is not UTF-8 at byte {error.start}; convert it first") from None


def _small(file: Path) -> Path:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror}") from None
    if size > MAX_BYTES:
        raise RequestError(f"{file} has {size} bytes; the limit is {MAX_BYTES}, cut it")
    return file
