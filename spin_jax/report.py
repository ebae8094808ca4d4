"""A run as one HTML page: its numbers, its curves, its answers; or several runs beside one another.

    python -m spin_jax.report --workdir=DIR [--output=FILE.html] [--png=DIR]
    python -m spin_jax.report --workdir=DIR,DIR,DIR --output=FILE.html

  --workdir=DIR       a run's, finished or still going on; several, separated by commas or by giving the
                      flag again, are compared, and those that differ in nothing but the seed become one
  --output=FILE       where the page goes (unset, and with one run: DIR/report.html)
  --png=DIR           writes every figure as PNG as well, on white, 300 dpi

The page is one file. It needs no script and no network, and follows light and dark; printed, it is light.

Examples:

  python -m spin_jax.report --workdir=/tmp/spin_tiny
  python -m spin_jax.report --workdir=runs/logistic,runs/hinge --output=compared.html --png=figures

Exit codes: 0 done, 1 failed (a full disk), 2 bad input.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from spin_jax.command import fail, parse


class Asked(NamedTuple):
    """What the flags ask for."""

    workdirs: list[str]
    output: str
    png: str | None


def write(workdirs: Sequence[str], output: str, png: str | None = None) -> list[str]:
    """Writes the page of one run, or of several beside one another; returns a line on what was written.

    Args:
        workdirs: those of the runs; one is enough.
        output: the HTML file.
        png: a folder for every figure as PNG.

    Raises:
        ValueError, FileNotFoundError: a workdir is none, or a file in it is damaged.
        OSError: nothing can be written there.
    """
    from etils import epath

    from spin_jax import figures, page, workdir
    from spin_jax.storage import files

    runs = dict(zip(names(workdirs), map(workdir.read, workdirs), strict=True))
    if len(runs) == 1:
        text, panels = page.of_run(*next(iter(runs.items())))
    else:
        text, panels = page.of_runs(grouped(runs))
    content = text.encode(errors="replace")  # half of a surrogate pair, in an answer
    files.write_here(output, content)
    said = [f"{output}: {len(panels)} figures, {len(content) / 1e6:.2g} MB"]
    if png:
        for panel in panels:
            files.write_here(epath.Path(png) / f"{panel.name}.png", figures.png(panel))
        said.append(f"{png}: {len(panels)} figures as PNG")
    return said


def names(workdirs: Sequence[str]) -> list[str]:
    """Each run's, short: the last part of its path, and as many before that as tell it from the others."""
    whole = [os.path.abspath(path) if path.endswith(".") else path for path in workdirs]
    parts = [path.rstrip("/").split("/") for path in whole]
    folders = list(zip(*(part[:-1] for part in parts), strict=False))
    shared = next((n for n, several in enumerate(folders) if len(set(several)) > 1), len(folders))
    return ["/".join(part[shared:]) for part in parts]


def grouped(runs: dict[str, Any]) -> list[Any]:
    """The runs that differ in nothing but their seed together."""
    from spin_jax import page, panels

    groups: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        groups.setdefault(json.dumps(page.differing_of(run), sort_keys=True), {})[name] = run
    shared = [_shared(list(group)) for group in groups.values()]
    return [
        panels.Group(name if shared.count(name) == 1 else ", ".join(group), list(group.values()))
        for name, group in zip(shared, groups.values(), strict=True)
    ]


def _shared(several: list[str]) -> str:
    """A name for runs of one group: what theirs begin with, if that says something."""
    if len(several) == 1:
        return several[0]
    count = next((n for n, letters in enumerate(zip(*several, strict=False)) if len(set(letters)) > 1), 0)
    start = several[0][:count].rstrip("0123456789_-./= ").removesuffix("seed").rstrip("_-./ ")
    return f"{start or several[0]} ({len(several)} seeds)"


def read_flags() -> Asked:
    """Raises ValueError for flags that do not go together."""
    given = flags.FLAGS
    workdirs = [part.rstrip("/") for value in given.workdir or [] for part in value.split(",") if part]
    if not workdirs:
        raise ValueError("--workdir is needed; see --help")
    if repeated := next((path for n, path in enumerate(workdirs) if path in workdirs[:n]), None):
        raise ValueError(f"--workdir names {repeated} twice")
    if len(workdirs) > 1 and not given.output:
        raise ValueError("several workdirs need --output=FILE.html: whose would the page be?")
    return Asked(workdirs, given.output or f"{workdirs[0]}/report.html", given.png)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0 done, 1 failed, 2 bad input."""
    flags.DEFINE_multi_string("workdir", None, "A run's; several are compared.")  # here, as in pairs.py
    flags.DEFINE_string("output", None, "HTML file to write.")
    flags.DEFINE_string("png", None, "Folder to write every figure to as PNG.")
    try:
        print(*write(*parse(sys.argv if argv is None else argv, read_flags)), sep="\n")
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error))
    except OSError as error:
        return fail(str(error), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
