"""Progress bars and short forms of numbers for the terminal."""

import sys

from tqdm import tqdm

from spin_jax.runtime import processes


def progress(description: str, total: int, done: int = 0, unit: str = "step") -> tqdm:
    """A progress bar with rate and ETA; without a terminal it prints a line every half minute."""
    live = sys.stderr.isatty()
    return tqdm(
        desc=f"{description:<22}",
        total=total,
        initial=done,
        unit=unit,
        dynamic_ncols=live,
        ncols=None if live else 120,
        mininterval=0.2 if live else 30,
        leave=True,
        disable=not processes.first(),
    )


def compact(number: float) -> str:
    """12345 → 12.3k, for the console."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """3 significant digits in the unit that suits them: 1.5 h, 20 ms."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs" if seconds else "0 s"
