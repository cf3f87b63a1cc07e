"""Sample prompts: from .txt lines (with another tool's letters), .toml, .json and [[sampling.prompts]] to one list."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from pydantic import ValidationError

from runner.config.diagnose import MOST_FINDINGS, diagnose, sentence
from runner.config.load import read
from runner.config.locate import Path
from runner.config.prompt_options import (
    DIALECTS,
    KOHYA_NAMES,
    OPTION,
    PICTURES,
    REPEATABLE,
    SAMPLER_ALIASES,
    Stray,
    letter_hint,
    sampler_name,
    strays,
)
from runner.config.schema import prompt_class
from runner.config.sections import SectionProblem, joined, parse_sections
from runner.config.source import Source
from runner.errors import Diagnostic, InvalidConfig, Place
from runner.files import MOST_TEXT_BYTES, file_problem, near_name, parsing, read_bytes
from schemas.sampling import Prompt

_FLOATS = ("cfg_scale", "embedded_guidance", "flow_shift", "seconds")
_BETWEEN = re.compile(r"[\s,]*")


class Placed(NamedTuple):
    """A prompt, and where each of its keys stands; the whole of it under ""."""

    prompt: Prompt
    places: Mapping[str, tuple[Place, ...]]


def read_prompt_file(file: FilePath, dialect: str) -> list[Prompt]:
    """All prompts of a file; the files that they name are relative to it. Raises `InvalidConfig` with every finding."""
    return [placed.prompt for placed in placed_prompts(file, dialect)]


def placed_prompts(file: FilePath, dialect: str) -> list[Placed]:
    """The same, with where everything stands."""
    return [Placed(located(found.prompt, file.absolute().parent), found.places) for found in _read(file, dialect)]


def _read(file: FilePath, dialect: str) -> list[Placed]:
    problem = file_problem(file)
    if problem is not None:
        raise InvalidConfig([Diagnostic(problem.replace("no file", "no prompt file", 1), hint=near_name(file))])
    suffix = file.suffix.lower()
    if suffix == ".toml":
        return _from_toml(file)
    if suffix == ".json":
        return _from_json(file)
    if suffix == ".txt":
        return _from_text(file, dialect)
    raise InvalidConfig([Diagnostic(f"{file.name}: prompt files end in .txt, .toml or .json")])


def _text_of(file: FilePath) -> str:
    try:
        return read_bytes(file, MOST_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidConfig(
            [Diagnostic(f"{file.name} is not UTF-8 (byte {error.start})", hint="save it as UTF-8")]
        ) from None
    except OSError as error:
        raise InvalidConfig([Diagnostic(f"{file} cannot be read: {error.strerror}")]) from None


def _from_text(file: FilePath, dialect: str) -> list[Placed]:
    prompts: list[Placed] = []
    findings: list[Diagnostic] = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", _text_of(file)), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            prompts.append(placed_line(line, dialect, file.name, number))
        except InvalidConfig as error:
            findings += error.diagnostics
    if findings:
        raise InvalidConfig(_first(findings))
    return prompts


def _first(findings: list[Diagnostic]) -> list[Diagnostic]:
    """As many findings as anybody reads at once."""
    more = len(findings) - MOST_FINDINGS
    return findings[:MOST_FINDINGS] + ([Diagnostic(f"and {more:,} more errors")] if more > 0 else [])


def parse_line(line: str, dialect: str, name: str = "prompt", number: int = 1) -> Prompt:
    """One line: the text, then options as ` --x value`. Raises `InvalidConfig` with line and column."""
    return placed_line(line, dialect, name, number).prompt


def placed_line(line: str, dialect: str, name: str, number: int) -> Placed:
    """The same, with where everything stands."""
    letters = DIALECTS[dialect]
    options = list(OPTION.finditer(line))
    text = (line[: options[0].start()] if options else line).strip()
    values: dict[str, Any] = {"prompt": text}
    places = {
        "": (
            Place(
                file=name, line=number, column=len(line) - len(line.lstrip()) + 1, length=max(1, len(text)), text=line
            ),
        )
    }
    findings = [
        _as_text(
            stray, dialect, Place(file=name, line=number, column=stray.start + 1, length=len(stray.written), text=line)
        )
        for stray in strays(line)
    ]
    if findings:
        raise InvalidConfig(findings)
    if options and not text:
        place = Place(
            file=name, line=number, column=options[0].start(1) - 1, length=len(options[0].group(1)) + 2, text=line
        )
        hint = "options stand on the line of their prompt, behind its text"
        raise InvalidConfig([Diagnostic("there is no prompt before the options", (place,), hint)])
    for option, following in zip(options, [*options, None][1:], strict=True):
        letter = option.group(1)
        raw = line[option.end() : following.start() if following else len(line)].strip()
        place = Place(file=name, line=number, column=option.start(1) - 1, length=len(letter) + 2, text=line)
        key = letters.get(letter)
        if key is None:
            findings.append(Diagnostic(f"unknown option `--{letter}`", (place,), letter_hint(letter, dialect)))
            continue
        if key in values and key not in REPEATABLE:
            findings.append(Diagnostic(f"option `--{letter}` stands twice", (place,), "keep one of them"))
            continue
        places[key] = (place,)
        try:
            value = _converted(key, raw)
            values[key] = [*values.get(key, []), value] if key in REPEATABLE else value
        except ValueError as error:
            findings.append(Diagnostic(f"option `--{letter}` ({key}): {error}", (place,)))
    if not findings:
        try:
            return Placed(prompt_class().model_validate(values), places)
        except ValidationError as error:
            for detail in error.errors():
                key = str(detail["loc"][0])
                letter = next((letter for letter, known in letters.items() if known == key), "")
                message = sentence(detail)
                where = places.get(key, places[""])
                findings.append(Diagnostic(f"option `--{letter}` ({key}): {message}", where))
    raise InvalidConfig(findings)


def _as_text(stray: Stray, dialect: str, place: Place) -> Diagnostic:
    return Diagnostic(
        f"`{stray.written}` would be a part of the text: an option is two dashes, its letter and a blank",
        (place,),
        f"write --{stray.letter(dialect)} {stray.value}",
    )


def _converted(key: str, raw: str) -> Any:
    if not raw and key != "negative_prompt":
        raise ValueError("its value is missing")
    if key == "negative_prompt":
        return raw
    if key == "sampler":
        return sampler_name(raw)
    if key == "one_frame":
        return one_frame_options(raw)
    if key in PICTURES:
        return raw
    try:
        return float(raw) if key in _FLOATS else int(raw)
    except ValueError:
        kind = "a number" if key in _FLOATS else "an integer"
        raise ValueError(f"must be {kind}, not {raw!r}") from None


def one_frame_options(raw: str) -> dict[str, Any]:
    """musubi-tuner's `--of`: `target_index=1,control_index=0;10,no_post,no_2x,no_4x`, or `default`."""
    found: dict[str, Any] = {}
    for part in (part.strip() for part in raw.split(",")):
        name, equals, value = part.partition("=")
        if part in ("default", ""):
            continue
        if part in ("no_post", "no_2x", "no_4x"):
            found[part] = True
        elif name in ("target_index", "control_index") and equals:
            try:
                numbers = [int(number) for number in value.split(";")]
            except ValueError:
                raise ValueError(f"{part!r} must hold whole numbers") from None
            found[name] = numbers if name == "control_index" else numbers[0]
        else:
            raise ValueError(f"there is no {part!r}; target_index=, control_index=, no_post, no_2x, no_4x or default")
    return found


def _from_toml(file: FilePath) -> list[Placed]:
    source = read(file)
    document = source.document
    if isinstance(document.get("prompt"), dict) and "prompts" not in document:
        shared = {name: value for name, value in document["prompt"].items() if name != "subset"}
        subsets = document["prompt"].get("subset", [])
        if not isinstance(subsets, list) or not all(isinstance(entry, dict) for entry in subsets):
            places = source.value_places(("prompt", "subset"))
            raise InvalidConfig(
                [Diagnostic("`prompt.subset` must be an array of tables", places, "write [[prompt.subset]]")]
            )
        entries: list[tuple[Path, Any]] = [
            (("prompt", "subset", index), {**shared, **entry}) for index, entry in enumerate(subsets)
        ]
        return _validated(entries, source, kohya=True)
    prompts = document.get("prompts")
    if not isinstance(prompts, list) or set(document) != {"prompts"}:
        hint = (
            "write [[prompts]] tables with the keys of [[sampling.prompts]], or Kohya's [prompt] with [[prompt.subset]]"
        )
        raise InvalidConfig([Diagnostic(f"{file.name} has no [[prompts]]", source.file_place(), hint)])
    return _validated([(("prompts", index), entry) for index, entry in enumerate(prompts)], source, kohya=False)


def _from_json(file: FilePath) -> list[Placed]:
    text = _text_of(file)
    with parsing(
        lambda reason: InvalidConfig([Diagnostic(f"{file.name} cannot be read: {reason}", (Place(file=file.name),))])
    ):
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            place = Place(
                file=file.name, line=error.lineno, column=error.colno, length=1, text=text.split("\n")[error.lineno - 1]
            )
            raise InvalidConfig([Diagnostic(f"not valid JSON: {error.msg}", (place,))]) from None
    if isinstance(content, dict) and isinstance(content.get("prompts"), list):
        content = content["prompts"]
    if not isinstance(content, list):
        raise InvalidConfig([Diagnostic(f"{file.name} must be a list of objects", (Place(file=file.name),))])
    source = Source(file=file, text="", document={"prompts": content})
    entries: list[tuple[Path, dict[str, Any]]] = [(("prompts", index), entry) for index, entry in enumerate(content)]
    return _validated(entries, source, True, _beginnings(text, file.name))


def _beginnings(text: str, name: str) -> list[Place]:
    """Where each prompt of a list in JSON begins."""
    decoder, lines = json.JSONDecoder(), text.split("\n")
    within = re.match(r"\s*\[", text) or re.search(r'"prompts"\s*:\s*\[', text)
    found: list[Place] = []
    at, counted, line = within.end() if within else len(text), 0, 1
    while True:
        blank = _BETWEEN.match(text, at)
        at = blank.end() if blank else at
        if at >= len(text) or text[at] == "]":
            return found
        line, counted = line + text.count("\n", counted, at), at
        found.append(
            Place(
                file=name, line=line, column=at - text.rfind("\n", 0, at), length=1, text=lines[line - 1].rstrip("\r")
            )
        )
        try:
            _, at = decoder.raw_decode(text, at)
        except ValueError:  # the words stood in a text before the list
            return found


def _validated(
    entries: list[tuple[Path, Any]], source: Source, kohya: bool, beginnings: Sequence[Place] = ()
) -> list[Placed]:
    """`beginnings` are those of the prompts of a JSON file."""
    prompts: list[Placed] = []
    findings: list[Diagnostic] = []
    for path, entry in entries:
        number = path[-1]
        assert isinstance(number, int)
        place = source.key_places(path) if source.text else (Place(file=source.shown_name),)
        if not isinstance(entry, dict):
            findings.append(Diagnostic(f"prompt {number + 1} must be a table with the key `prompt`", place))
            continue
        values: dict[str, Any] = {
            (KOHYA_NAMES.get(str(name), str(name)) if kohya else str(name)): value for name, value in entry.items()
        }
        if isinstance(values.get("sampler"), str):
            values["sampler"] = SAMPLER_ALIASES.get(values["sampler"], values["sampler"])
        with parsing(partial(_unreadable, number, place)):
            text = json.dumps(values, default=str)
            json.dumps(values, default=str, ensure_ascii=False).encode("utf-8")
        try:
            prompt = prompt_class().model_validate_json(text, strict=True)
            prompts.append(Placed(prompt, _places(path, entry, source, beginnings)))
        except ValidationError as error:
            found, wrong = diagnose(
                error, Source(file=source.file, text="", document=values, shown_name=source.shown_name)
            )
            places = _places(path, entry, source, beginnings)
            for item, own in zip(found, wrong, strict=False):
                where = places.get(str(own[0]) if own else "", places[""])
                findings.append(Diagnostic(f"prompt {number + 1}: {item.message}", where, item.hint))
    if findings:
        raise InvalidConfig(_first(findings))
    return prompts


def _places(
    path: Path, entry: Mapping[str, Any], source: Source, beginnings: Sequence[Place]
) -> dict[str, tuple[Place, ...]]:
    """Where the keys of a prompt stand in a .toml file: in its table, or in Kohya's [prompt]; in JSON, where it begins."""
    if not source.text:
        number = path[-1]
        assert isinstance(number, int)
        return {"": (beginnings[number],) if number < len(beginnings) else source.file_place()}
    whole = source.header_places(path)
    places = {"": whole}
    for name in entry:
        own = (*path, name) if source.value((*path, name)) is not None else (path[0], name)
        places[name] = places[KOHYA_NAMES.get(name, name)] = source.value_places(own)
    return places


def _unreadable(number: int, place: tuple[Place, ...], reason: str) -> InvalidConfig:
    return InvalidConfig([Diagnostic(f"prompt {number + 1} cannot be read: {reason}", place)])


def located(prompt: Any, base: FilePath, keys: Collection[str] | None = None) -> Any:
    """A prompt (or the defaults of prompts) whose files are named from the folder of the file that it stands in; only
    under `keys`, where they are given."""
    changes: dict[str, Any] = {}
    for key in ("image", "end_image", "image_mask"):
        value = getattr(prompt, key)
        if value is not None and (keys is None or key in keys):
            changes[key] = _located(value, base) if key == "image" else _absolute(value, base)
    for key in ("control_images", "control_masks"):
        value = getattr(prompt, key)
        if value is not None and (keys is None or key in keys):
            changes[key] = [_absolute(name, base) for name in value]
    return prompt.model_copy(update=changes) if changes else prompt


def _located(text: str, base: FilePath) -> str:
    try:
        said = parse_sections(text)
    except SectionProblem:
        return text  # said where it is used
    return joined({number: _absolute(value, base) for number, value in said.values.items()})


def _absolute(name: str, base: FilePath) -> str:
    return str(base / FilePath(name).expanduser())
