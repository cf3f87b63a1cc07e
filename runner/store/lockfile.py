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

LOCK_VERSION = 1
_PACKAGES = (
    "accelerate", "bitsandbytes", "diffusers", "numpy", "peft", "pillow", "runner", "safetensors", "tokenizers", "torch",
    "transformers",
)  # fmt: skip
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
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        write_text(target, text)


def read_lock(run_file: Path) -> dict[str, Any]:
    """Raises `LockedDiffers` where there is no lock, `Invalid` where it cannot be read."""
    file = lock_file(run_file)
    try:
        content = tomli.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LockedDiffers(
            f"there is no {file.name}", hint="run `runner apply` once without --locked and commit the lock"
        ) from None
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise Invalid(f"{file} cannot be read: {error}") from None
    if not isinstance(content.get("version"), int) or content["version"] > LOCK_VERSION:
        raise Invalid(
            f"{file.name} was written by a newer runner (lock version {content.get('version')})", hint="update runner"
        )
    return content


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
