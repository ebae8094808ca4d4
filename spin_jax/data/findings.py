"""What reading the rows of a dataset found: which rows are bad, what was cut, which columns nothing reads."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from spin_jax.data.records import PAIR_COLUMNS, list_names
from spin_jax.errors import BadRow, EmptyAnswer


@dataclasses.dataclass
class Findings:
    """What was found in the rows so far. Every error is kept as [row number, message]."""

    bad_rows: str  # what to do with a bad row: "error" or "drop"
    counts: Counter = dataclasses.field(default_factory=Counter)  # rows dropped or cut, by the reason
    unused_columns: Counter = dataclasses.field(default_factory=Counter)  # columns that nothing reads
    rows_with_unused: int = 0  # rows that have such a column
    first_dropped: list[Any] | None = None  # the error of the first row that is bad or has an empty answer
    problem: list[Any] | None = None  # the first error that ends the reading

    @contextlib.contextmanager
    def reading(self, number: int, place: str) -> Iterator[None]:
        """Surrounds the work on one row, and keeps its error: either the row is dropped, or reading ends."""
        try:
            yield
        except ValueError as error:
            reason = str(error) if str(error).startswith(place) else f"{place}: {error}"
            empty = isinstance(error, EmptyAnswer)
            if empty or (isinstance(error, BadRow) and self.bad_rows == "drop"):
                self.counts["dropped: empty answer" if empty else "dropped: bad row"] += 1
                self.first_dropped = self.first_dropped or [number, reason]
            else:
                self.problem = [number, reason]

    def note_unused_columns(self, row: dict[str, Any], used: Iterable[str], fields: Iterable[str] = ()) -> None:
        """Counts the columns of a row that nothing reads, and such fields of its messages.

        The columns of a file of pairs belong together.
        """
        used = {*used, "prompt_id", "tools"}
        if "real" in used:
            used.update(PAIR_COLUMNS)
        unused = [name for name, value in row.items() if name not in used and value is not None]
        unused += [f"{name} (in messages)" for name in fields]
        self.unused_columns.update(unused)
        self.rows_with_unused += bool(unused)

    def final_counts(self, path: str, total: int, max_bad: float) -> Counter:
        """The counts to report. It raises ValueError for the row that ended the reading, or for too many bad ones."""
        if self.problem:
            raise ValueError(self.problem[1])
        dropped = self.counts["dropped: empty answer"] + self.counts["dropped: bad row"]
        if self.first_dropped and dropped > max_bad * total:
            raise ValueError(
                f"{path}: {dropped} of {total} rows are bad or have an empty answer, and data.max_bad="
                f"{max_bad:g} of them may be; the first is {self.first_dropped[1]}"
            )
        if self.unused_columns:
            names = list_names(sorted(self.unused_columns))
            self.counts[f"not used: columns {names}; rows with them"] = self.rows_with_unused
        return +self.counts


def merge_findings(parts: Sequence[dict[str, Any]]) -> Findings:
    """Merges the fields of each process's `Findings`, as if one process had read all rows."""
    return Findings(
        bad_rows=parts[0]["bad_rows"],
        counts=sum((Counter(part["counts"]) for part in parts), Counter()),
        unused_columns=sum((Counter(part["unused_columns"]) for part in parts), Counter()),
        rows_with_unused=sum(part["rows_with_unused"] for part in parts),
        first_dropped=min((part["first_dropped"] for part in parts if part["first_dropped"]), default=None),
        problem=min((part["problem"] for part in parts if part["problem"]), default=None),
    )
