"""Recipes, command lines, and the arguments of `generate`."""

from __future__ import annotations

import io
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from grpo_fast import generate
from grpo_fast.config.command_line import TRAIN, TRAIN_REWARD, Command, parse
from grpo_fast.config.toml import to_toml
from grpo_fast.errors import UserError
from grpo_fast.shown import plain_text
from tests.fuzz.target import Target

CONFIGS = Path(__file__).parents[2] / "configs"


def _recipe(command: Command[Any]):
    def run(data: bytes, folder: Path) -> None:
        (folder / "recipe.toml").write_bytes(data)
        config = parse(["--config", str(folder / "recipe.toml")], command).config
        (folder / "again.toml").write_text(to_toml(config), encoding="utf-8")
        again = parse(["--config", str(folder / "again.toml")], command).config
        assert repr(again) == repr(config), "what was written is not what was read"

    return run


def _recipes(*names: str) -> list[bytes]:
    return [
        path.read_bytes()
        for path in sorted(CONFIGS.rglob("*.toml"))
        if ("reward" in path.name) == ("reward" in names)
    ]


def _words(data: bytes) -> list[str]:
    return data.decode("utf-8", "surrogateescape").split("\n")


def _command_line(data: bytes, folder: Path) -> None:
    with _quiet():
        parse(_words(data))


def _generate(data: bytes, folder: Path) -> None:
    class Speaker:
        def __init__(self, run: str, **_: Any) -> None: ...

        def answer(self, prompt: str, **_: Any) -> list[generate.Answer]:
            return [generate.Answer(text=prompt, scores={prompt: 0.5}, tokens=1, cut=True)]

    with _quiet() as said, mock.patch.object(generate, "Speaker", Speaker):
        generate.main(_words(data))
    text = said.getvalue()
    assert plain_text(text) == text, f"control characters were printed: {text!r}"


@contextmanager
def _quiet():
    said = io.StringIO()
    with (
        redirect_stdout(said),
        redirect_stderr(io.StringIO()),
        mock.patch.object(sys, "stdin", io.StringIO("a line\n")),
    ):
        yield said


LINES = [
    b"--optim.lr\n1e-4\n--run.steps=3\n--name\nx\n--reward.weights\nsafety=1\ntone=2\n--no-run.wandb",
    b"--policy.model\nfolder/model\n--data.prompts\nprompts.jsonl\n--reward.functions\nmodule:function\n--loss.betas\n0.9\n1",
    b"--judge.url\nhttp://127.0.0.1:8000/v1\n--judge.model\nm\n--judge.rubrics\nkind=good\n--rollout.stop_strings\nend",
    b"--resume\nruns/x\n--run.steps\n5",
    b"--engine.kind\nvllm\n--engine.url\nhttp://127.0.0.1:8000\n--engine.retries\n2",
]
ARGUMENTS = [
    b"runs/x\na prompt\nanother\n--samples\n2\n--temperature\n0.5",
    b"runs/x\n--seed\n1\n--format\nplain\n--max-new-tokens\n4",
]

TARGETS = {
    "settings.recipe": Target(run=_recipe(TRAIN), corpus=lambda: _recipes("train")),
    "settings.reward_recipe": Target(run=_recipe(TRAIN_REWARD), corpus=lambda: _recipes("reward")),
    "settings.command_line": Target(run=_command_line, corpus=lambda: LINES, errors=(UserError, SystemExit)),
    "settings.generate": Target(run=_generate, corpus=lambda: ARGUMENTS, errors=(UserError, SystemExit)),
}
