"""Imports and calls the functions that a user names in a config as `module:function`."""

import importlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SOURCES: dict[str, bytes] = {}  # the source of each user's module when it was imported


def import_function(path: str) -> Callable:
    """Returns the function that `module:function` names; ValueError if it cannot be imported.

    A module is imported again when its file has changed, as happens beside a notebook.
    """
    module, _, name = path.partition(":")
    try:
        loaded = importlib.import_module(module)
        file = getattr(loaded, "__file__", None)
        source = Path(file).read_bytes() if file else b""
        if _SOURCES.setdefault(module, source) != source:
            loaded = importlib.reload(loaded)
            _SOURCES[module] = source
        function = getattr(loaded, name)
    except (Exception, SystemExit) as error:  # a module can raise anything
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
        raise ValueError(f"{path!r} cannot be imported: {type(error).__name__}: {error}{place}") from error
    if not callable(function):
        raise ValueError(f"{path!r} is no function, but {function!r:.80}")
    return function


def called(path: str) -> Any:
    """Calls the function that `module:function` names and returns its result; ValueError when it fails."""
    function = import_function(path)
    try:
        return function()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}:{frame.lineno}"
        raise ValueError(f"{path!r} failed: {type(error).__name__}: {error} ({place})") from error
