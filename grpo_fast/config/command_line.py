"""From a command line and a TOML file to a `TrainConfig`, and back to TOML.

Values come from the defaults, then the file of `--config`, then the flags, each over the one before. Files
and flags go through the same conversion, so that a mistake reads the same wherever it was made; tyro
renders `--help` from the dataclasses.
"""

from __future__ import annotations

import re
import sys
import tomllib
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from grpo_fast.config.check import FieldError, flatten
from grpo_fast.config.settings import TrainConfig
from grpo_fast.errors import UserError, did_you_mean

_COMMAND_LINE = "command line"

# What may change when a run goes on: how long and where, not what is computed.
_RESUMABLE = (
    "run.",
    "device",
    "threads",
    "reward.timeout_s",
    "reward.workers",
    "rollout.max_rows",
    "optim.token_budget",
    "policy.backend",
    "policy.liger",
)

# Names other trainers use, for the hint beside an unknown one.
_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "beta": "loss.kl_coef",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "num_generations": "rollout.group_size",
    "max_completion_length": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_steps": "run.steps",
    "num_iterations": "optim.updates_per_rollout",
    "reward_funcs": "reward.functions",
    "reward_weights": "reward.weights",
    "loss_type": "loss.preset",
    "scale_rewards": "advantage.scale",
    "dataset_name": "data.prompts",
    "model_name_or_path": "policy.model",
    "dir": "output_dir",
    "run_name": "name",
    "lora_r": "policy.lora_rank",
    "lora_target_modules": "policy.lora_targets",
}


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """What the command line asks for."""

    config: TrainConfig
    dry_run: bool
    resume: Path | None


@dataclass(frozen=True, kw_only=True)
class _Help(TrainConfig):
    """Align a language model on several objectives at once with Group Relative Policy Optimization.

    Without an argument: the miniature, which downloads nothing and takes minutes on a CPU. Every flag is
    also a key of the TOML file: --optim.lr is lr under [optim]. One weight alone: --reward.weights.NAME 2;
    none of a file's weights: --reward.weights with nothing after it.
    """

    config: str = ""
    """TOML file with settings; flags given beside it win."""
    dry_run: bool = False
    """Load and check everything, print the plan, stop."""
    resume: str = ""
    """Folder of an interrupted run: go on from its last checkpoint with its settings."""


def _field_kinds(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field name -> its type, sections excluded."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        kinds |= _field_kinds(kind, f"{prefix}{name}.") if is_dataclass(kind) else {prefix + name: kind}
    return kinds


_KINDS = _field_kinds(TrainConfig)
_SECTIONS = {item.name for item in fields(TrainConfig)} - set(_KINDS)
_MAPPINGS = {name for name, kind in _KINDS.items() if get_origin(kind) is dict}


def parse(argv: Sequence[str] | None = None) -> Invocation:
    """Reads the command line (`sys.argv` by default).

    Raises `UserError` with one line for whatever cannot be used; `--help` prints and exits with code 0.
    """
    flags = _split(list(sys.argv[1:] if argv is None else argv))
    special = {name: values for name, values in flags if name in ("config", "dry_run", "resume")}
    dry_run = _convert(_from_words(special.get("dry_run", ["false"]), bool), bool, "dry_run", _COMMAND_LINE)
    resume = _one_path(special, "resume")
    recipe = _one_path(special, "config")
    if resume and recipe:
        raise UserError("--config cannot be given with --resume: a run goes on with its own config.toml")
    if resume:
        recipe = resume / "config.toml"
        if not recipe.is_file():
            found = "has no config.toml" if resume.is_dir() else "does not exist"
            raise UserError(f"--resume must be the folder of a run, {resume} {found}")

    values: dict[str, tuple[Any, str]] = read_toml(recipe) if recipe else {}
    for name, words in flags:
        if name in special:
            continue
        if resume and not name.startswith(_RESUMABLE):
            raise UserError(
                f"--{name} cannot be given with --resume: a run goes on with its own settings; what may change is "
                f"{', '.join(_RESUMABLE)}"
            )
        _take_flag(values, name, words)
    return Invocation(config=_build(values), dry_run=dry_run, resume=resume)


def _build(values: dict[str, tuple[Any, str]]) -> TrainConfig:
    """The defaults with `values`, dotted name -> (value, where it was given), put over them."""
    chosen = {name: value for name, (value, _) in values.items()}
    if chosen.get("policy.model"):
        # The defaults suit a small model trained from scratch; these two would harm a real one.
        chosen.setdefault("optim.lr", 1e-5 if chosen.get("policy.lora_rank") else 1e-6)
        chosen.setdefault("rollout.max_new_tokens", 256)
    top = {name: value for name, value in chosen.items() if "." not in name}
    for section in _SECTIONS:
        inside = {
            name.split(".")[1]: value for name, value in chosen.items() if name.startswith(section + ".")
        }
        if inside:
            top[section] = replace(getattr(TrainConfig(), section), **inside)
    try:
        return TrainConfig(**top)
    except FieldError as error:
        given = [name for name in values if error.field == name or error.field.startswith(name + ".")]
        raise FieldError(error.field, error.problem, values[given[0]][1] if given else "") from None


# ---- TOML ----


def read_toml(path: Path) -> dict[str, tuple[Any, str]]:
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
        if key not in _SECTIONS:
            values |= _read_key(key, value, where)
        elif not isinstance(value, dict):
            raise UserError(f"{key} must be a table ([{key}]), got {value!r} ({where})")
        else:
            for inner, item in value.items():
                name = f"{key}.{inner}"
                values |= _read_key(name, item, f"{path}:{lines[name]}" if name in lines else where)
    return values


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


def _read_key(name: str, value: Any, where: str) -> dict[str, tuple[Any, str]]:
    if name not in _KINDS:
        hint = did_you_mean(name, _SECTIONS) if isinstance(value, dict) and "." not in name else _hint(name)
        raise UserError(f"unknown key {name} in {where}{hint}".replace("\n", " "))
    return {name: (_convert(value, _KINDS[name], name, where), where)}


def _hint(name: str) -> str:
    usual = _ELSEWHERE.get(name.rpartition(".")[2])
    return (
        f"; did you mean {usual}?" if usual else did_you_mean(name, [*_KINDS, "config", "dry_run", "resume"])
    )


def to_toml(config: TrainConfig) -> str:
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
    match value:
        case bool():
            return str(value).lower()
        case str():
            escaped = "".join(
                f"\\u{ord(letter):04x}" if ord(letter) < 32 or ord(letter) == 127 else letter
                for letter in value.replace("\\", "\\\\").replace('"', '\\"')
            )
            return f'"{escaped}"'
        case tuple():
            return f"[{', '.join(map(_toml_value, value))}]"
        case dict():
            return "{" + ", ".join(f"{_toml_value(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    return repr(value)


# ---- flags ----


def _split(argv: list[str]) -> list[tuple[str, list[str]]]:
    """[(name with underscores, words after it)]; prints the help and exits where it is asked for."""
    if "-h" in argv or "--help" in argv:
        import tyro  # 0.15 s, and only needed here

        tyro.cli(_Help, args=["--help"], prog="python -m grpo_fast.train")
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word[2:].partition("=")
            name, negated = _known_flag(flag)
            flags.append((name, ["false"] * negated + [value] * bool(equals)))
        elif not flags:
            raise UserError(f"unexpected argument {word!r}: settings are given as --section.field value")
        else:
            flags[-1][1].append(word)
    return flags


def _known_flag(flag: str) -> tuple[str, bool]:
    """(name, whether it is the `no-` form of a switch)."""
    if any(flag.startswith(name + ".") and flag != name + "." for name in _MAPPINGS):
        return flag, False
    name = flag.replace("-", "_")
    if name in _KINDS or name in ("config", "dry_run", "resume"):
        return name, False
    head, dot, last = name.rpartition(".")
    positive = head + dot + last.removeprefix("no_")
    if last.startswith("no_") and (_KINDS.get(positive) is bool or positive == "dry_run"):
        return positive, True
    raise UserError(f"unknown flag --{flag}{_hint(name).replace('_', '-').replace('mean ', 'mean --')}")


def _one_path(special: dict[str, list[str]], name: str) -> Path | None:
    words = special.get(name)
    if words is None:
        return None
    if len(words) != 1 or not words[0]:
        raise UserError(f"--{name} takes one path, got {' '.join(words) or 'none'}")
    return Path(words[0])


def _take_flag(values: dict[str, tuple[Any, str]], name: str, words: list[str]) -> None:
    for mapping in _MAPPINGS:
        if name.startswith(mapping + "."):
            given = values.get(mapping, ({}, ""))[0]
            key, kind = name.removeprefix(mapping + "."), get_args(_KINDS[mapping])[1]
            values[mapping] = (
                given | {key: _convert(_from_words(words, kind), kind, name, _COMMAND_LINE)},
                _COMMAND_LINE,
            )
            return
    kind = _KINDS[name]
    values[name] = (_convert(_from_words(words, kind), kind, name, _COMMAND_LINE), _COMMAND_LINE)


def _from_words(words: list[str], kind: Any) -> Any:
    """What TOML would have held; a word that does not fit stays a text, for `_convert` to refuse."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if [word.lower() for word in words] == ["none"] else _from_words(words, inner[0])
    if origin is tuple:
        return [_from_words([word], inner[0]) for word in words]
    if origin is dict:
        pairs = [word.rpartition("=")[::2] for word in words]
        if words and len(words) % 2 == 0 and not any("=" in word for word in words):
            pairs = list(zip(words[::2], words[1::2], strict=True))
        return {key: _from_words([value], inner[1]) for key, value in pairs}
    if kind is bool:
        text = " ".join(words).lower()
        return True if text in ("", "true", "1", "yes") else False if text in ("false", "0", "no") else text
    text = words[0] if len(words) == 1 else words
    try:
        return kind(text) if kind in (int, float) and isinstance(text, str) else text
    except ValueError:
        return text


# ---- conversion, the same for both ----


def _convert(value: Any, kind: Any, name: str, source: str) -> Any:
    """`value` as the field's type; raises `FieldError` naming what would be right."""
    converted = _fit(value, kind)
    if converted is _MISFIT:
        got = (
            " ".join(map(str, value)) or "nothing" if source == _COMMAND_LINE and value == [] else repr(value)
        )
        raise FieldError(name, f"must be {_described(kind)}, got {got}".replace("\n", " "), source)
    return converted


_MISFIT = object()


def _fit(value: Any, kind: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _fit(value, inner[0])
    if origin is Literal:
        return value if isinstance(value, str) and value in inner else _MISFIT
    if origin is tuple:
        exact = inner[-1] is not Ellipsis
        if not isinstance(value, list) or (exact and len(value) != len(inner)):
            return _MISFIT
        items = tuple(_fit(item, inner[0]) for item in value)
        return _MISFIT if _MISFIT in items else items
    if origin is dict:
        if not isinstance(value, dict) or "" in value:
            return _MISFIT
        pairs = {key: _fit(item, inner[1]) for key, item in value.items()}
        return _MISFIT if _MISFIT in pairs.values() else pairs
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return float(value)
    if kind is str and isinstance(value, str):
        try:
            value.encode()  # an undecodable argument could not be written to config.toml
        except UnicodeEncodeError:
            return _MISFIT
    return value if type(value) is kind else _MISFIT


def _described(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _described(inner[0])
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is tuple:
        return "a list of texts" if inner[-1] is Ellipsis else f"{len(inner)} numbers"
    if origin is dict:
        what = "number" if inner[1] is float else " or ".join(get_args(inner[1]))
        return f"name = {what} pairs"
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
