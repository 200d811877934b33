"""Shell completion of a command's flags and of the values that are one of a few; paths are left to the shell.

The scripts are plain word lists: pressing Tab starts no Python.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from grpo_fast.config.schema import field_help, field_kinds
from grpo_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class _Flag:
    name: str
    """With its dashes"""
    help: str
    choices: tuple[str, ...]
    """Of its value; empty: anything, paths among it"""
    switch: bool
    """Whether it needs no value"""


def completion(program: str, config: type, shell: str) -> str:
    """The script that makes `shell` complete the flags of `program`, whose settings are the fields of `config`."""
    shells = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    if shell not in shells:
        raise UserError(f"--print-completion must be one of {', '.join(shells)}, got {shell or 'nothing'}")
    return shells[shell](program, _flags(config))


def _flags(config: type) -> list[_Flag]:
    helps = {name: " ".join(line.split()) for name, line in field_help(config).items()}
    flags = [_Flag(name="--help", help="Explain every flag", choices=(), switch=True)]
    for name, kind in field_kinds(config).items():
        spelt = (name, _negated(name)) if kind is bool else (name,)
        flags += [
            _Flag(
                name="--" + flag.replace("_", "-"),
                help=helps.get(name, ""),
                choices=_choices(kind),
                switch=kind is bool,
            )
            for flag in spelt
        ]
    return flags


def _negated(name: str) -> str:
    head, dot, last = name.rpartition(".")
    return f"{head}{dot}no_{last}"


def _choices(kind: Any) -> tuple[str, ...]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return (*_choices(inner[0]), "none") if _choices(inner[0]) else ()
    return tuple(word for word in inner if word) if origin is Literal else ()


def _bash(program: str, flags: list[_Flag]) -> str:
    function = "_" + program.replace("-", "_")
    cases = [
        f"    {flag.name}) COMPREPLY=($(compgen -W '{' '.join(flag.choices)}' -- \"$word\")); return ;;"
        for flag in flags
        if flag.choices
    ]
    names = " ".join(flag.name for flag in flags)
    return "\n".join(
        [
            f"{function}() {{",
            "  local word=${COMP_WORDS[COMP_CWORD]} flag=${COMP_WORDS[COMP_CWORD-1]}",
            "  COMPREPLY=()",
            '  if [[ $word == "=" ]]; then word=',  # bash parts words at the equals sign
            '  elif [[ $flag == "=" ]]; then flag=${COMP_WORDS[COMP_CWORD-2]}; fi',
            "  case $flag in",
            *cases,
            "  esac",
            f"  [[ $word == -* ]] && COMPREPLY=($(compgen -W '{names}' -- \"$word\"))",
            "}",
            f"complete -o default -F {function} {program}",
            "",
        ]
    )


def _zsh(program: str, flags: list[_Flag]) -> str:
    function = "_" + program.replace("-", "_")
    lines: list[str] = []
    for flag in flags:
        said = "".join(f"\\{c}" if c in "\\[]:" else c for c in flag.help).replace("'", "'\\''")
        value = f"({' '.join(flag.choices)})" if flag.choices else "_files"
        lines.append(f"    '*{flag.name}[{said}]{'' if flag.switch else f':value:{value}'}' \\")
    return "\n".join(
        [
            f"#compdef {program}",
            f"{function}() {{",
            "  _arguments \\",
            *lines,
            "    '*:value:_files'",
            "}",
            f'if [[ $funcstack[1] == {function} ]]; then {function} "$@"; else compdef {function} {program}; fi',
            "",
        ]
    )


def _fish(program: str, flags: list[_Flag]) -> str:
    lines: list[str] = []
    for flag in flags:
        said = flag.help.replace("\\", "\\\\").replace("'", "\\'")
        value = f" -x -a '{' '.join(flag.choices)}'" if flag.choices else "" if flag.switch else " -r"
        lines.append(f"complete -c {program} -l {flag.name.removeprefix('--')}{value} -d '{said}'")
    return "\n".join([*lines, ""])
