"""runner schema."""

from __future__ import annotations

import json
from pathlib import Path

import click

from runner.cli import out


def schema_text() -> str:
    """The JSON Schema of run.toml with every key's documentation, as editors read it."""
    from runner.config.schema import everything
    from schemas.walk import docstrings, section_of

    whole = everything()
    schema = whole.model_json_schema()
    sections = {"RunConfig": whole}

    def collect(model: type) -> None:
        for field in model.model_fields.values():  # type: ignore[attr-defined]
            section = section_of(field.annotation)
            if section is not None and section.__name__ not in sections:
                sections[section.__name__] = section  # type: ignore[assignment]
                collect(section)

    collect(whole)
    for name, section in sections.items():
        part = schema if name == "RunConfig" else schema["$defs"][name]
        part["description"] = (section.__doc__ or "").strip()
        for key, text in docstrings(section).items():
            part["properties"][key]["description"] = text
    schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    schema["title"] = "run.toml"
    return json.dumps(schema, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


@click.command()
@click.option("--out", "out_file", type=click.Path(path_type=Path), help="Write to a file instead of stdout.")
def command(out_file: Path | None) -> None:
    """Write the JSON Schema of run.toml. With `#:schema ./run.schema.json` as its first line, editors complete and check it."""
    if out_file is None:
        out.data(schema_text().rstrip())
    else:
        from runner.atomic import write_text

        write_text(out_file, schema_text())
        out.say(f"written to {out_file}")
