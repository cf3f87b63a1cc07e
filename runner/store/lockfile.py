"""run.lock: what a run was made from and with, beside run.toml; `apply --locked` refuses where anything differs."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import tomli
import tomlkit

from runner.atomic import write_text
from runner.errors import Invalid, LockedDiffers
from runner.files import MOST_TEXT_BYTES, parsing, read_bytes

LOCK_VERSION = 1
_PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "numpy",
    "peft",
    "pillow",
    "runner",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
_HEADER = "Written by runner; commit it. `runner apply --locked` runs only if everything here still holds."


def lock_file(run_file: Path) -> Path:
    """run.toml → run.lock."""
    return run_file.with_suffix(".lock")


def environment(device: str) -> dict[str, str]:
    """Versions that results depend on; the device's name is added by apply, which has loaded torch."""
    found = {"python": platform.python_version(), "platform": f"{sys.platform}-{platform.machine()}", "device": device}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_lock(run_file: Path, content: dict[str, dict[str, Any]]) -> None:
    """Writes the lock: tables of plain values, sorted, so that a diff of it can be read."""
    document = tomlkit.document()
    document.add(tomlkit.comment(_HEADER))
    document.add("version", tomlkit.item(LOCK_VERSION))
    for name in sorted(content):
        table = tomlkit.table()
        for key in sorted(content[name]):
            value = content[name][key]
            table.add(key, tomlkit.item(value if isinstance(value, (str, int, float, bool)) else json.dumps(value)))
        document.add(name, table)
    text = tomlkit.dumps(document)
    target = lock_file(run_file)
    try:
        same = read_bytes(target, MOST_TEXT_BYTES) == text.encode("utf-8")
    except OSError:
        same = False
    if not same:
        write_text(target, text)


def read_lock(run_file: Path) -> dict[str, Any]:
    """Raises `LockedDiffers` where there is no lock, `Invalid` where it cannot be read."""
    file = lock_file(run_file)
    try:
        raw = read_bytes(file, MOST_TEXT_BYTES)
    except FileNotFoundError:
        raise LockedDiffers(
            f"there is no {file.name}", hint="run `runner apply` once without --locked and commit the lock"
        ) from None
    except OSError as error:
        raise Invalid(f"{file} cannot be read: {error.strerror}") from None

    def no_lock(reason: str) -> Invalid:
        return Invalid(f"{file} cannot be read: {reason}", hint="apply once without --locked to write it anew")

    with parsing(no_lock):
        content = tomli.loads(raw.decode("utf-8"))
    version = content.pop("version", None)
    if type(version) is not int:
        raise no_lock("it has no version")
    if version > LOCK_VERSION:
        raise Invalid(f"{file.name} was written by a newer runner (lock version {version})", hint="update runner")
    for name, table in content.items():
        if not isinstance(table, dict) or not all(_is_plain(value) for value in table.values()):
            raise no_lock(f"`{name}` is no table of plain values")
    return content


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, float)) or (isinstance(value, int) and value.bit_length() < 64)


def differences(lock: dict[str, Any], now: dict[str, dict[str, Any]]) -> list[str]:
    """`environment.torch: 2.13.0 → 2.14.0` for everything that the lock says and that is otherwise now."""
    found = []
    for name, table in now.items():
        old = lock.get(name, {})
        for key in sorted(set(old) | set(table)):
            value = table.get(key)
            plain = value if isinstance(value, (str, int, float, bool)) or value is None else json.dumps(value)
            if old.get(key) != plain:
                found.append(f"{name}.{key}: {_shown(old.get(key))} → {_shown(plain)}")
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "absent"
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
