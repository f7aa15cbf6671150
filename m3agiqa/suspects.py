"""Which rows may have killed an engine: whatever was in it when it died, narrowed down until one stands alone.

A batch that was twice in an engine when it died is cut in halves, which go in alone, one after the other; a half
that is alone when the engine dies is halved again. A row that is alone twice when that happens is poison.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

# One death tells little: a node that is taken away kills its engines too.
DEATHS_TO_SUSPECT = 2
"""Deaths in company after which rows go in alone."""
DEATHS_TO_CONVICT = 2
"""Deaths alone after which a row is poison."""


@dataclass(frozen=True)
class Plan:
    """How the rows of a batch go into the engine, by their places in the batch.

    Attributes:
        together: those that nothing is known of, beside any other batch.
        alone: groups that go in one after the other with nothing beside them.
        poison: those that do not go in any more.
    """

    together: list[int] = field(default_factory=list)
    alone: list[list[int]] = field(default_factory=list)
    poison: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Losses:
    """Engines that an actor lost, while they were loaded or with rows in them, since a row last came out scored.

    Attributes:
        count: how many.
        loading: whether the last one was lost before it was up.
    """

    count: int
    loading: bool


class Suspects:
    """What is in the engines, and what was when one died. Rows are named by their ids, engines by their actors'."""

    def __init__(self) -> None:
        self._loading: set[str] = set()
        self._inside: dict[str, list[tuple[tuple[str, ...], bool]]] = {}
        self._deaths: Counter[str] = Counter()
        self._share: dict[str, int] = {}
        self._died_alone: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()

    def enter(self, actor: str, ids: Sequence[str], alone: bool) -> None:
        """Rows go into an actor's engine."""
        self._inside.setdefault(actor, []).append((tuple(ids), alone))

    def leave(self, actor: str, ids: Sequence[str], alone: bool) -> None:
        """They came out of it, so they are not what kills it."""
        inside = self._inside.get(actor, [])
        if (group := (tuple(ids), alone)) in inside:
            inside.remove(group)
        self._losses[actor] = 0
        for name in ids:
            self._deaths.pop(name, None)
            self._share.pop(name, None)
            self._died_alone.pop(name, None)

    def started(self, actor: str) -> Losses:
        """An actor's process is new, and its engine is going to be loaded: what was in the one before died with it."""
        groups = self._inside.pop(actor, [])
        unloaded = actor in self._loading
        self._loading.add(actor)
        self._losses[actor] += bool(groups) or unloaded
        for ids, alone in groups:
            if not alone:
                self._deaths.update(ids)
                continue
            self._share |= dict.fromkeys(ids, (len(ids) + 1) // 2)
            if len(ids) == 1:
                self._died_alone[ids[0]] += 1
        return Losses(self._losses[actor], unloaded)

    def loaded(self, actor: str) -> None:
        """Its engine is up."""
        self._loading.discard(actor)

    def losses(self, actor: str) -> int:
        """The count that `started` returned last, or 0 where rows came out scored since."""
        return self._losses[actor]

    def plan(self, ids: Sequence[str]) -> Plan:
        """How these rows are to go in."""
        plan = Plan()
        suspects: list[int] = []
        for place, name in enumerate(ids):
            if self._died_alone[name] >= DEATHS_TO_CONVICT:
                plan.poison.append(place)
            elif self._deaths[name] >= DEATHS_TO_SUSPECT or name in self._share:
                suspects.append(place)
            else:
                plan.together.append(place)
        half = (len(suspects) + 1) // 2
        while suspects:
            size = self._share.get(ids[suspects[0]], half)
            size = min(self._share.get(ids[place], half) for place in suspects[:size])
            plan.alone.append(suspects[:size])
            suspects = suspects[size:]
        return plan
