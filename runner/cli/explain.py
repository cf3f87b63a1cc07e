"""runner explain."""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING

import click

from runner.cli import out
from runner.errors import UsageError

if TYPE_CHECKING:
    from schemas.walk import Key

_MOST = 20
"""Lines of one list."""


@click.command()
@click.argument("name", metavar="KEY")
def command(name: str) -> None:
    """Explain KEY (training.learning_rate) or a section (training): type, default, meaning, consequence.

    Any other word, another tool's name among them, is looked for in names and explanations.
    """
    from runner.config.schema import all_keys, everything

    everything()
    keys = all_keys()
    wanted = name.strip("[] ").replace("[]", "")
    if wanted not in keys:
        matches = [dotted for dotted in keys if dotted.endswith("." + wanted)]
        if len(matches) != 1 and "." not in wanted:
            _search(name, wanted, keys)
            return
        if len(matches) != 1:
            near = matches or difflib.get_close_matches(wanted, keys, 3, 0.5)
            raise UsageError(f"there is no key {name!r}", hint=f"there is {', '.join(near)}" if near else None)
        wanted = matches[0]
    key = keys[wanted]
    if key.section is not None:
        _section(key, keys)
    else:
        _key(key)


def _search(name: str, wanted: str, keys: dict[str, Key]) -> None:
    """Lists the keys that a word is found in: names first, then other tools' names, then explanations."""
    from runner.config.foreign import FOREIGN_KEYS

    word = wanted.lower().replace("-", "_")
    foreign = FOREIGN_KEYS.get(word)
    if foreign is not None:
        out.data(f"here: {foreign}" + (f"  {_first_sentence(keys[foreign])}" if foreign in keys else ""))
    named = [dotted for dotted in keys if word in dotted.lower() and not _of_source(dotted, keys)]
    theirs: dict[str, list[str]] = {}
    for other, ours in FOREIGN_KEYS.items():
        if word in other and ours != foreign:
            theirs.setdefault(ours, []).append(other)
    pattern = re.compile(rf"\b{re.escape(word.replace('_', ' '))}|\b{re.escape(word)}", re.IGNORECASE)
    told = [
        dotted
        for dotted, key in keys.items()
        if dotted not in named and not _of_source(dotted, keys) and pattern.search(key.documentation)
    ]
    if not named and not theirs and not told and foreign is None:
        near = difflib.get_close_matches(wanted, [*keys, *FOREIGN_KEYS], 3, 0.5)
        hint = f"there is {', '.join(near)}" if near else "`runner explain training` lists a section's keys"
        raise UsageError(f"there is no key {name!r}, and nothing is said of it", hint=hint)
    width = max((len(dotted) for dotted in (*named[:_MOST], *told[:_MOST])), default=0)
    _list(f"keys named {word}", [f"{dotted:<{width}}  {_first_sentence(keys[dotted])}" for dotted in named])
    _list("other tools' names", [f"{', '.join(others)}: {ours}" for ours, others in theirs.items()])
    _list(f"keys that say {word}", [f"{dotted:<{width}}  {_first_sentence(keys[dotted])}" for dotted in told])


def _list(head: str, lines: list[str]) -> None:
    if lines:
        out.data(out.paint(head, "bold"))
        for line in lines[:_MOST]:
            out.data(f"  {line}")
        if len(lines) > _MOST:
            out.data(f"  … and {len(lines) - _MOST} more")


def _of_source(dotted: str, keys: dict[str, Key]) -> bool:
    """Whether a key of [[dataset.sources]] or [[sampling.prompts]] stands above it too, where it is listed."""
    head, _, last = dotted.rpartition(".")
    return head in ("dataset.sources", "sampling.prompts") and f"{head.rpartition('.')[0]}.{last}" in keys


def _first_sentence(key: Key) -> str:
    return re.split(r"\. |: ", key.documentation)[0].rstrip(".")


def _key(key: Key) -> None:
    out.data(out.paint(key.dotted, "bold"))
    out.data(f"  type     {key.type_text}")
    out.data(f"  default  {default_text(key)}")
    out.data(f"  effect   {effect_text(key)}")
    out.data("")
    out.data(_wrapped(key.documentation))


def _section(key: Key, keys: dict[str, Key]) -> None:
    brackets = f"[[{key.dotted}]]" if key.is_array_of_tables else f"[{key.dotted}]"
    out.data(out.paint(brackets, "bold") + "  " + key.documentation)
    out.data("")
    for other in keys.values():
        if other.path[:-1] == key.path:
            out.data(f"  {other.path[-1]:<28} {default_text(other):<12} {_first_sentence(other)}")


def default_text(key: Key) -> str:
    """The default as TOML shows it."""
    if key.required:
        return "required"
    if key.section is not None:
        return "section"
    value = key.default
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


def effect_text(key: Key) -> str:
    """What changing the key does, in words."""
    from runner.plan.stages.registry import words

    if key.effect == "bits":
        return "the same mathematics in other bytes: nothing is made anew, the lock records it"
    what = "changes no result" if key.effect == "none" else "changes results"
    again = ", ".join(words()[stage] for stage in key.stages)
    return f"{what}: {again}" if again else what


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 100))
