"""What a MODEL may be called, and which file names may enter the store.

    smollm2:135m                    an alias
    ./model.gguf  ./directory       a path
    hf:org/repo[/file]              a model hub
    pip:dist==version/path/in/wheel a wheel on the user's package index

Everything that comes from outside (a command line, an alias file, a manifest, a zip member, a hub's listing) passes
through here before it becomes part of a path, a URL or an argument. Functions of text: knows no files, no network.
"""

from __future__ import annotations

import hashlib
import re

from msgspec import Struct

from llm_os.kernel.errors import StoreError

_ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(:[a-z0-9][a-z0-9._-]{0,63})?", re.ASCII)
_HUB_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_DIST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?", re.ASCII)
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.!+_-]{0,63}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_LONGEST = 200  # bytes: file systems stop at 255, and temporary names need room
_SCHEMES = ("hf", "pip", "file")


class Wheel(Struct, frozen=True):
    """`pip:dist==version/member`. Neither dist nor version can be read as an option or a requirement with a URL."""

    dist: str
    version: str
    member: str  # the path inside the wheel, '/' between its parts


class Hub(Struct, frozen=True):
    """`hf:org/repo` (a safetensors directory) or `hf:org/repo/file` (one file, maybe in a folder of the repository)."""

    repo: str
    file: str | None


class Local(Struct, frozen=True):
    """`file:/absolute/path`: only in alias files, because a MODEL that is a path needs no prefix."""

    path: str


Source = Wheel | Hub | Local


def is_alias(text: str) -> bool:
    return _ALIAS.fullmatch(text) is not None and text.split(":")[0] not in _SCHEMES


def is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


def is_source(text: str) -> bool:
    """Whether `text` begins like a source that a MODEL may name directly; it may still be malformed."""
    return text.startswith(("hf:", "pip:"))


def source(text: str) -> Source:
    """Parse a source. Raises StoreError that names the part at fault."""
    scheme, _, rest = text.partition(":")
    if scheme == "pip":
        requirement, _, member = rest.partition("/")
        dist, equals, version = requirement.partition("==")
        if not (equals and _DIST.fullmatch(dist) and _VERSION.fullmatch(version) and member):
            raise StoreError(f"{shown(text)}: a wheel is written pip:dist==version/path/in/wheel")
        return Wheel(dist, version, _inner_path(text, member))
    if scheme == "hf":
        parts = rest.split("/", 2)
        if len(parts) < 2 or not all(_HUB_PART.fullmatch(part) and ".." not in part for part in parts[:2]):
            raise StoreError(f"{shown(text)}: a hub model is written hf:org/repo or hf:org/repo/file")
        return Hub(f"{parts[0]}/{parts[1]}", _inner_path(text, parts[2]) if len(parts) == 3 else None)
    if scheme == "file" and rest and rest.isprintable():
        return Local(rest)
    raise StoreError(f"{shown(text)}: a source begins with hf:, pip: or file:")


def file_name(name: str) -> str:
    """`name` if it can be the name of one plain file on every system, else StoreError that says why not."""
    if (problem := _problem(name)) is not None:
        raise StoreError(f"file name {shown(name)} {problem}; it will not be written to the model store")
    return name


def key(model: str) -> str:
    """The stem of the files that belong to `model`: readable, its own, and never empty, a device or a dot."""
    readable = re.sub(r"[^a-z0-9]+", "-", model.lower(), flags=re.ASCII).strip("-")[:48].strip("-")
    digest = hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{readable or 'model'}-{digest}"


def shown(text: str) -> str:
    """`text` quoted for a one-line message: no control characters, at most 120 of it."""
    return repr(text if len(text) <= 120 else text[:117] + "...")


def _inner_path(text: str, path: str) -> str:
    for part in path.split("/"):
        if (problem := _problem(part)) is not None:
            raise StoreError(f"{shown(text)}: path part {shown(part)} {problem}")
    return path


def _problem(name: str) -> str | None:
    if not name:
        return "is empty"
    if not name.isprintable() or any(character in '/\\:*?"<>|' for character in name):
        return 'has a character that is not allowed: control characters and / \\ : * ? " < > |'
    if name.startswith((".", "-", " ", "~")) or name.endswith((".", " ")):
        return "begins with one of . - ~ or a space, or ends with a dot or a space"
    if _DEVICES.fullmatch(name):
        return "is the name of a device on Windows"
    if len(name.encode()) > _LONGEST:
        return f"is longer than {_LONGEST} bytes"
    return None
