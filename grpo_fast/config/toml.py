"""TOML files of settings: reading with the line of a mistake, and writing what was resolved."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from grpo_fast.config.rules import flatten
from grpo_fast.config.schema import Schema, convert
from grpo_fast.errors import UserError, did_you_mean
from grpo_fast.typed import is_dict, is_tuple


def read_toml(path: Path, schema: Schema) -> dict[str, tuple[Any, str]]:
    """Dotted name -> (value of the field's type, file name), for every key of the file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        document = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {str(error) or 'nested too deeply'}") from None
    values: dict[str, tuple[Any, str]] = {}
    lines = _lines_of_keys(text)
    for key, value in document.items():
        where = f"{path}:{lines[key]}" if key in lines else str(path)
        if key not in schema.sections:
            values |= _read_key(schema, key, value, where)
        elif not is_dict(value):
            raise UserError(f"{key} must be a table ([{key}]), got {value!r} ({where})")
        else:
            for inner, item in value.items():
                name = f"{key}.{inner}"
                values |= _read_key(schema, name, item, f"{path}:{lines[name]}" if name in lines else where)
    return values


def tables(path: Path) -> list[str]:
    """Names of the tables of a file, [] for one that cannot be read (`read_toml` says why)."""
    try:
        return [
            key
            for key, value in tomllib.loads(path.read_text("utf-8-sig")).items()
            if isinstance(value, dict)
        ]
    except (OSError, ValueError, RecursionError):
        return []


def _lines_of_keys(text: str) -> dict[str, int]:
    """Dotted name of a key or table -> the line where it first stands, for plain keys."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.split("\n"), start=1):
        header, key = re.match(r"\s*\[+\s*([\w.-]+)\s*\]", line), re.match(r"\s*([\w.-]+)\s*=", line)
        if header:
            table = header[1]
        if header or key:
            name = table if header else f"{table}.{key[1]}".lstrip(".") if key else ""
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                lines.setdefault(".".join(parts[:depth]), number)
    return lines


def _read_key(schema: Schema, name: str, value: Any, where: str) -> dict[str, tuple[Any, str]]:
    if name not in schema.kinds:
        hint = (
            did_you_mean(name, schema.sections)
            if isinstance(value, dict) and "." not in name
            else schema.hint(name)
        )
        raise UserError(f"unknown key {name} in {where}{hint}".replace("\n", " "))
    return {name: (convert(value, schema.kinds[name], name, where), where)}


def to_toml(config: Any) -> str:
    """The whole configuration as TOML; `read_toml` gives it back. Fields that are None are left out."""
    lines: list[str] = []
    section = ""
    for name, value in flatten(config).items():
        head, _, key = name.rpartition(".")
        if head != section:
            lines += ["", f"[{head}]"]
            section = head
        if value is not None:
            lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(letter):04x}" if ord(letter) < 32 or ord(letter) == 127 else letter
            for letter in value.replace("\\", "\\\\").replace('"', '\\"')
        )
        return f'"{escaped}"'
    if is_tuple(value):
        return f"[{', '.join(map(_toml_value, value))}]"
    if is_dict(value):
        return "{" + ", ".join(f"{_toml_value(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    return repr(value)
