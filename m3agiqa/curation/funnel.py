"""Which rule dropped which row: one narrow table, a row for each row of the scores."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import duckdb

from m3agiqa.curation.expressions import first, literal
from m3agiqa.errors import UserError

INPUT = "input"


@dataclass(frozen=True)
class Step:
    """What one rule did: rows it dropped, and rows it left."""

    rule: str
    dropped: int
    left: int


@dataclass
class Funnel:
    """The table `work` (id, dropped: the place of a rule in `steps`, or null, and what rules need) and its rules.

    Attributes:
        notes: what a reader of the result should know, in words.
    """

    con: duckdb.DuckDBPyConnection
    value: str
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def start(self, columns: dict[str, str], conditions: list[tuple[str, str]], relation: str) -> None:
        """Makes the table in one pass over the scores; the rules of single rows are applied on the way.

        Args:
            columns: name -> SQL of what later rules need. conditions: rule -> SQL that must be true, in order.

        Raises:
            UserError: if a rule leaves nothing.
        """
        cases = " ".join(
            f"WHEN NOT coalesce({condition}, false) THEN {place}"
            for place, (_, condition) in enumerate(conditions, start=1)
        )
        named = "".join(f", {sql} AS {name}" for name, sql in columns.items())
        query = f"SELECT id, CAST(CASE {cases} END AS SMALLINT) AS dropped{named} FROM {relation}"
        try:
            self.con.execute(f"CREATE TABLE work AS {query}")
        except (duckdb.ConversionException, duckdb.InvalidInputException, duckdb.OutOfRangeException) as error:
            # A value that an expression cannot take is found only where it is.
            reason = str(error).splitlines()[0]
            raise UserError(self.value, f"a rule cannot be computed for a row ({reason})", "use TRY_CAST") from None
        counts = dict(self.con.execute("SELECT coalesce(dropped, 0), count(*) FROM work GROUP BY 1").fetchall())
        left = sum(counts.values())
        self.steps.append(Step(INPUT, 0, left))
        for place, (rule, _) in enumerate(conditions, start=1):
            left -= counts.get(place, 0)
            self._note(Step(rule, counts.get(place, 0), left))

    def drop(self, rule: str, query: str) -> None:
        """Drops the rows whose `rowid` a query over `work` gives.

        Raises:
            UserError: if nothing is left.
        """
        before = self.steps[-1].left
        which = f"dropped IS NULL AND rowid IN (SELECT rowid FROM {query})"
        self.con.execute(f"UPDATE work SET dropped = {len(self.steps)} WHERE {which}")
        left = self._count("dropped IS NULL")
        self._note(Step(rule, before - left, left))

    def names(self) -> str:
        """SQL of the rule that dropped a row of `work`."""
        return f"list_extract([{', '.join(literal(step.rule) for step in self.steps)}], dropped + 1)"

    def kept(self, columns: str = "rowid, *") -> str:
        """SQL of the rows that are left, as a subquery."""
        return f"(SELECT {columns} FROM work WHERE dropped IS NULL)"

    def sheet(self) -> list[dict[str, Any]]:
        """The steps as they are written: rule, dropped, left."""
        return [asdict(step) for step in self.steps]

    def lines(self) -> Iterator[str]:
        """The steps as a table for people."""
        width = max(len(step.rule) for step in self.steps)
        yield f"{'rule':<{width}}  {'dropped':>12}  {'left':>12}"
        for step in self.steps:
            yield f"{step.rule:<{width}}  {step.dropped:>12,}  {step.left:>12,}"

    def _count(self, condition: str) -> int:
        return int(first(self.con, f"SELECT count(*) FROM work WHERE {condition}")[0])

    def _note(self, step: Step) -> None:
        before = self.steps[-1]
        self.steps.append(step)
        if step.left:
            return
        if not before.left:
            raise UserError(self.value, "holds no rows", "score some images into it first")
        rows = "row" if before.left == 1 else "rows"
        raise UserError(f"{step.rule}", f"leaves none of {before.left:,} {rows}", "choose a milder rule")
