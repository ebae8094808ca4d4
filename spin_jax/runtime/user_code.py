"""Functions that a user names in a config as `module:function`: imported, and called."""

import importlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SOURCES: dict[str, bytes] = {}  # of users' modules, as they were imported


def import_function(path: str) -> Callable:
    """The function behind `module:function`; ValueError when there is none, or its module fails.

    A module whose file has been edited since, as in a notebook, is imported anew.
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
    """What the function behind `module:function` returns; ValueError when it raises anything."""
    function = import_function(path)
    try:
        return function()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        raise ValueError(f"{path!r} failed: {reason}") from error
