"""Why a stage is another one than at the last apply: the difference between two trees of facts (runner/facts.py)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from runner.config.schema import all_keys
from runner.dataset.encodings import TrainItem
from runner.dataset.item_facts import NOUNS, item_digests
from runner.facts import Fact, digest, leaves
from runner.plan.compile import Graph
from runner.plan.history import Applied, flat_config, schema_path
from runner.plan.stage import Stage
from schemas.walk import Key

OTHER_VERSION = "it was made by another version of runner"


class Reason(NamedTuple):
    """A reason in words; the key of run.toml and its old value, where it is that."""

    text: str
    key: str | None = None
    old: Any = None


class Differences:
    """A run against its last apply."""

    def __init__(self, applied: Applied, graph: Graph) -> None:
        self.applied, self.prepared, self.graph = applied, graph.given, graph
        self.now = flat_config(self.prepared.config)
        then = applied.record.get("config", {})
        self.then: Mapping[str, Any] = then
        self.changed = sorted(path for path in {*then, *self.now} if then.get(path) != self.now.get(path))
        self._items: dict[str, list[str]] | None = None

    def of(self, stage: str) -> list[Reason]:
        """Why this stage is another one; nothing where it is the same, or where it only follows another one."""
        old = self.applied.facts(stage)
        node = self.graph.nodes[stage]
        if old is None:
            return [] if self.applied.has_facts else self._without_facts(stage, node.stage.follows)
        differing = [(name, fact) for name, fact in leaves(node.facts) if old.get(name) != digest(fact)]
        keys = {reason.key: reason for _, fact in differing for reason in self._keys(fact)}
        found = [
            *(keys[path] for path in self.changed if path in keys),
            *(reason for find in (self._contents, self._files) for _, fact in differing for reason in find(fact)),
        ]
        if not found and any("dataset.config_file" in fact.origin for _, fact in differing):
            found = list(self._declared({stage, *node.stage.follows}, "dataset"))  # other items, each as it was
        if not found and any(fact.files for _, fact in differing):
            found = [Reason(f"{name} makes something else of them") for name in self._found_out_otherwise(stage)]
        if not found and any(not fact.origin and name.endswith("version") for name, fact in differing):
            found = [Reason(OTHER_VERSION)]
        return list({reason.text: reason for reason in found}.values())

    def _found_out_otherwise(self, stage: str) -> Iterator[str]:
        """The earlier stages that have something to say of the items, and are others than they were."""
        for name, node in self.graph.nodes.items():
            if name == stage:
                return
            says = type(node.stage).settled is not Stage.settled
            if says and self.applied.fingerprint(name) not in (None, node.fingerprint):
                yield name

    def _keys(self, fact: Fact) -> Iterator[Reason]:
        """The keys that the fact comes from and that have another value."""
        for origin in self._origins(fact):
            for path in self.changed:
                if _is_below(path, origin) and (path == origin or ".**." in origin or _decides(path)):
                    yield self._said(path)

    def _origins(self, fact: Fact) -> tuple[str, ...]:
        """Where the fact comes from: of the keys that may name files, those up to the first that is given."""
        if fact.content is None:
            return fact.origin
        given = [n for n, key in enumerate(fact.origin) if self.now.get(key) is not None]
        return fact.origin[: given[0] + 1] if given else fact.origin

    def _contents(self, fact: Fact) -> Iterator[Reason]:
        """Files of another content, where the keys that name them say the same."""
        origins = self._origins(fact)
        if fact.content is not None and not set(origins) & set(self.changed):
            yield Reason(
                f"{origins[-1]}: {f'the content of {fact.content}' if fact.content else 'its content'} changed"
            )
        old = self.applied.record.get("files", {})
        for key in origins:
            if key in self.prepared.read_files and old.get(key) not in (None, self.prepared.read_files[key]):
                yield Reason(f"{key}: its content changed")

    def _files(self, fact: Fact) -> Iterator[Reason]:
        """The items that were added or removed, and those whose files of this kind were changed, by name."""
        if fact.files is not None:
            if self._items is None:
                self._items = self._of_items()
            yield from (Reason(text) for noun in ("", fact.files) for text in self._items[noun])

    def _of_items(self) -> dict[str, list[str]]:
        """Kind of file → what became of them; "" → of whole items."""
        old, collection = self.applied.items, self.prepared.collection
        new: dict[str, TrainItem] = {item.name: item for item in (*collection.items, *collection.held_out)}
        added, removed = sorted(set(new) - set(old)), sorted(set(old) - set(new))
        found: dict[str, list[str]] = {noun: [] for noun in ("", *NOUNS)}
        for word, names in (("added", added), ("removed", removed)):
            if names:
                several = f"{len(names)} items {word} ({_some(names)})"
                found[""].append(several if len(names) > 1 else f"{names[0]} {word}")
        changed: dict[tuple[str, str], list[str]] = {}
        for name, item in new.items():
            for noun, then, now in zip(NOUNS, old.get(name, ()), item_digests(item), strict=False):
                if then != now:  # an older record says less
                    word = "added" if not then else "removed" if not now else "replaced"
                    changed.setdefault((noun, "edited" if noun == "caption" else word), []).append(name)
        for (noun, word), names in changed.items():
            found[noun].append(f"{len(names)} {noun}{'s' * (len(names) > 1)} {word} ({_some(sorted(names))})")
        return found

    def _declared(self, stages: set[str], table: str = "") -> Iterator[Reason]:
        """Changed keys that the schema says to reach one of the stages."""
        for path in self.changed:
            key = _key(path)
            if key is not None and key.effect != "bits" and stages & set(key.stages) and _is_below(path, table):
                yield self._said(path)

    def _without_facts(self, stage: str, upstream: Sequence[str]) -> list[Reason]:
        """Of an apply that left no facts behind."""
        found = [
            *self._declared({stage, *upstream}),
            *(Reason(text) for own in self._of_items().values() for text in own),
        ]
        return found or [Reason(OTHER_VERSION)] * (self.applied.fingerprint(stage) != self.graph.fingerprint(stage))

    def _said(self, path: str) -> Reason:
        then, now = self.then.get(path), self.now.get(path)
        return Reason(f"{path} {_shown(then)} → {_shown(now)}", path, then)


def texts(reasons: Iterable[Reason]) -> list[str]:
    return [reason.text for reason in reasons]


def _key(path: str) -> Key | None:
    """The key behind a path; that of the table for an entry of a table such as optimizer.args."""
    keys, schema = all_keys(), schema_path(path)
    return keys.get(schema) or keys.get(schema.rpartition(".")[0])


def _decides(path: str) -> bool:
    key = _key(path)
    return key is not None and key.effect == "trajectory"


def _is_below(path: str, origin: str) -> bool:
    """Whether a path is an origin's (Fact.origin)."""
    table, _, name = origin.partition(".**.")
    schema = schema_path(path)
    if name:
        parts = schema.split(".")
        return parts[0] == table and name in parts[1:]
    return not table or schema == table or schema.startswith(table + ".") or path == origin


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _shown(value: Any) -> str:
    text = "unset" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "…"
