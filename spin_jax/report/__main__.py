"""A run as one HTML page: its numbers, its curves, its answers; or several runs beside one another.

    python -m spin_jax.report --workdir=DIR [--output=FILE.html] [--png=DIR]
    python -m spin_jax.report --workdir=DIR,DIR,DIR --output=FILE.html

  --workdir=DIR       of a run, which may be finished or still going on. Several, separated by commas or by
                      giving the flag again, are compared; runs that differ in nothing but the seed become one
  --output=FILE       where the page goes (by default, and with one run: DIR/report.html)
  --png=DIR           writes every chart as PNG as well, on white, 300 dpi

The page is one file. It needs no script and no network, and follows light and dark; printed, it is light.

Examples:

  python -m spin_jax.report --workdir=/tmp/spin_tiny
  python -m spin_jax.report --workdir=runs/logistic,runs/hinge --output=compared.html --png=charts

Exit codes: 0 done, 1 failed (a full disk), 2 bad input.
"""

import sys

from absl import flags

from spin_jax.cli import fail, parse


def read_flags() -> tuple[list[str], str, str | None]:
    """The arguments of `page.write`; ValueError for flags that do not go together."""
    given = flags.FLAGS
    workdirs = [part.rstrip("/") for value in given.workdir or [] for part in value.split(",") if part]
    if not workdirs:
        raise ValueError("--workdir is needed; see --help")
    if repeated := next((path for n, path in enumerate(workdirs) if path in workdirs[:n]), None):
        raise ValueError(f"--workdir names {repeated} twice")
    if len(workdirs) > 1 and not given.output:
        raise ValueError("several workdirs need --output=FILE.html: their page has no folder of its own")
    return workdirs, given.output or f"{workdirs[0]}/report.html", given.png


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0 done, 1 failed, 2 bad input."""
    flags.DEFINE_multi_string("workdir", None, "A run's; several are compared.")  # here, as in pairs.py
    flags.DEFINE_string("output", None, "HTML file to write.")
    flags.DEFINE_string("png", None, "Folder to write every chart to as PNG.")
    try:
        arguments = parse(sys.argv if argv is None else argv, read_flags)
        from spin_jax.report import page  # help is quick without it

        print(*page.write(*arguments), sep="\n")
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error))
    except OSError as error:
        return fail(str(error), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
