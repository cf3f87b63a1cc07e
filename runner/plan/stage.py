"""What a stage is: an entry in a list (plan/stages/registry.py), by which graph, plan, apply, gc and report know it; torch-free.

What a stage computes with torch is imported when it runs, from its `address`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

from runner.dataset.buckets import View
from runner.dataset.encodings import TrainItem
from runner.facts import Tree

if TYPE_CHECKING:
    from runner.plan.compile import Graph, Run
    from runner.plan.diff import Plan, Planning
    from runner.plan.prepare import Prepared

Symbol = Literal["+", "~", "-/+", "="]
_WORDS = {"+": "create", "~": "continue", "-/+": "replace", "=": "none"}


class Inputs(Protocol):
    """What every stage's inputs can tell."""

    def facts(self) -> Tree: ...


I = TypeVar("I", bound=Inputs)  # noqa: E741


@dataclass(kw_only=True)
class Action:
    """What one stage does. `missing` of `total` things are made: items, steps, pictures, measurements."""

    node: str
    symbol: Symbol
    summary: str
    reasons: list[str] = field(default_factory=list)
    total: int = 0
    missing: int = 0
    throws_away: str | None = None
    """The trained work in whose place another training would be shown, in words; apply asks before it."""

    @property
    def pending(self) -> bool:
        return self.symbol != "="

    def as_record(self) -> dict[str, Any]:
        """The action for `--json`."""
        return {
            "stage": self.node,
            "action": _WORDS[self.symbol],
            "symbol": self.symbol,
            "summary": self.summary,
            "reasons": self.reasons,
            "total": self.total,
            "missing": self.missing,
        }


class Reads(NamedTuple):
    """The encodings that a stage reads from the caches: views of items, and texts."""

    views: Sequence[tuple[TrainItem, View]] = ()
    texts: Sequence[str] = ()


def joined(found: Iterable[Reads]) -> Reads:
    """Views one after the other, and texts, each once."""
    own = list(found)
    texts = dict.fromkeys(text for reads in own for text in reads.texts)
    return Reads([view for reads in own for view in reads.views], list(texts))


class Told(NamedTuple):
    """What a finished stage adds to the report: cards (name, value) and blocks of text (title, text)."""

    cards: Sequence[tuple[str, str]] = ()
    blocks: Sequence[tuple[str, str]] = ()


class Stage(ABC, Generic[I]):
    """One kind of node of the graph."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    follows: ClassVar[tuple[str, ...]] = ()
    """Stages that have to be done before."""
    before: ClassVar[tuple[str, ...]] = ()
    """Stages that have to wait for it."""
    alias: ClassVar[str | None] = None
    """Another name for --target, for several stages together."""
    address: ClassVar[str]
    """`module:function` of what it does: (Job, its inputs) → None."""
    again: ClassVar[str]
    """What it means that it is done again, in words."""
    locked: ClassVar[bool] = False
    """Its fingerprint stands in run.lock."""
    makes: ClassVar[tuple[str, ...]] = ()
    """The kinds of things of the store that it makes again where they turn out damaged."""

    @abstractmethod
    def inputs(self, run: Run) -> I | None:
        """What it is given; None: the run has no such stage."""

    @abstractmethod
    def pending(self, inputs: I, planning: Planning) -> Action:
        """What there is to do, and why."""

    def settled(self, prepared: Prepared, inputs: I, fingerprint: str) -> Prepared:
        """The run as later stages see it: with what this one has made, or with what is known only after it
        (`Prepared.known_after`)."""
        return prepared

    def reads(self, inputs: I) -> Reads:
        """The encodings that it reads from the caches, where it has something to do."""
        return Reads()

    def reads_now(self, action: Action) -> bool:
        """Whether what it has to do needs those encodings."""
        return action.pending

    def keys(self, inputs: I, graph: Graph) -> Mapping[str, Iterable[str]]:
        """Kind of item in the store → the keys that it needs, for gc."""
        return {}

    def disk(self, inputs: I, plan: Plan) -> Mapping[str, int]:
        """Kind of file → predicted bytes that it adds to the store."""
        return {}

    def memory(self, inputs: I, plan: Plan) -> Mapping[str, int]:
        """Phase → predicted peak bytes, beside what the family's model of memory says."""
        return {}

    def told(self, inputs: I, graph: Graph) -> Told:
        """What the report says of it."""
        return Told()

    def run(self, job: Any, inputs: I) -> None:
        """Does it."""
        work: Callable[[Any, I], None] = resolve_name(self.address)
        work(job, inputs)
