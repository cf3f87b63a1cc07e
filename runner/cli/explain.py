"""runner explain."""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING

import click

from runner.cli import out
from runner.errors import UsageError

if TYPE_CHECKING:
    from schemas.walk import Key

_STAGE_WORDS = {
    "cache.latents": "pictures are encoded again", "cache.text": "captions are encoded again", "train": "training starts anew",
    "sample": "samples are made again", "select": "the choice is made again", "publish": "files are published again",
}  # fmt: skip


@click.command()
@click.argument("name", metavar="KEY")
def command(name: str) -> None:
    """Explain KEY (training.learning_rate) or a section (training): type, default, meaning, consequence."""
    from runner.config.foreign import FOREIGN_KEYS
    from schemas.walk import all_keys

    keys = all_keys()
    wanted = name.strip("[] ").replace("[]", "")
    if wanted not in keys:
        matches = [dotted for dotted in keys if dotted.endswith("." + wanted)]
        if len(matches) == 1:
            wanted = matches[0]
        else:
            foreign = FOREIGN_KEYS.get(wanted.lower().replace("-", "_"))
            near = difflib.get_close_matches(wanted, keys, 3, 0.5)
            hint = (
                f"here: {foreign}" if foreign else f"there is {', '.join(matches or near)}" if matches or near else None
            )
            raise UsageError(f"there is no key {name!r}", hint=hint)
    key = keys[wanted]
    if key.section is not None:
        _section(key, keys)
    else:
        _key(key)


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
            first = other.documentation.split(". ")[0].rstrip(".")
            out.data(f"  {other.path[-1]:<28} {default_text(other):<12} {first}")


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
    if key.effect == "none":
        return "changes no result" + (": files are published again" if "publish" in key.stages else "")
    if key.effect == "bits":
        return "the same mathematics in other bytes: nothing is made anew, the lock records it"
    words = [_STAGE_WORDS[stage] for stage in key.stages]
    return "changes results: " + ", ".join(words)


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 100))
