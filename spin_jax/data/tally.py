"""What was found in the rows of a dataset: what was dropped, cut or not used, and what is an error."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from spin_jax.data.parquet import PAIR_SCHEMA
from spin_jax.data.records import listed
from spin_jax.errors import BadRow, EmptyAnswer


@dataclasses.dataclass
class Tally:
    """What was found in rows, and what is done about it."""

    bad_rows: str  # "error" or "drop"
    counts: Counter = dataclasses.field(default_factory=Counter)
    unused: Counter = dataclasses.field(default_factory=Counter)  # columns that nothing reads
    with_unused: int = 0  # rows
    bad: int = 0  # rows dropped for what they are
    first_bad: list[Any] | None = None  # its number, and an error
    problem: list[Any] | None = None  # the same, of a row that ends it all

    @contextlib.contextmanager
    def row(self, number: int, place: str) -> Iterator[None]:
        """Around all that is done with a row: a bad one is counted where it may be dropped."""
        try:
            yield
        except ValueError as error:
            reason = str(error) if str(error).startswith(place) else f"{place}: {error}"
            empty = isinstance(error, EmptyAnswer)
            if empty or (isinstance(error, BadRow) and self.bad_rows == "drop"):
                self.counts["dropped: empty answer" if empty else "dropped: bad row"] += 1
                self.bad += 1
                self.first_bad = self.first_bad or [number, reason]
            else:
                self.problem = [number, reason]

    def see_unused(self, row: dict[str, Any], used: Iterable[str]) -> None:
        """Notes the columns that nothing reads. Those of pairs belong together."""
        used = {*used, "prompt_id"}
        if "real" in used:
            used.update(PAIR_SCHEMA.names)
        unused = [name for name, value in row.items() if name not in used and value is not None]
        self.unused.update(unused)
        self.with_unused += bool(unused)

    def settled(self, path: str, total: int, max_bad: float) -> Counter:
        """The counts, of `total` rows.

        Raises:
            ValueError: a row was to end it all, or too many were bad.
        """
        if self.problem:
            raise ValueError(self.problem[1])
        if self.first_bad and self.bad > max_bad * total:
            raise ValueError(
                f"{path}: {self.bad} of {total} rows are bad or have an empty answer, and data.max_bad="
                f"{max_bad:g} of them may be; the first is {self.first_bad[1]}"
            )
        if self.unused:
            self.counts[f"not used: columns {listed(sorted(self.unused))}; rows with them"] = self.with_unused
        return +self.counts


def merged(found: Sequence[dict[str, Any]]) -> Tally:
    """What the tallies of several processes found, as one that had seen all rows would have it."""
    return Tally(
        found[0]["bad_rows"],
        sum((Counter(tally["counts"]) for tally in found), Counter()),
        sum((Counter(tally["unused"]) for tally in found), Counter()),
        sum(tally["with_unused"] for tally in found),
        sum(tally["bad"] for tally in found),
        min((tally["first_bad"] for tally in found if tally["first_bad"]), default=None),
        min((tally["problem"] for tally in found if tally["problem"]), default=None),
    )
