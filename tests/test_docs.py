"""What the documentation says is there is there: flags, links, settings, metrics, messages, files."""

import ast
import importlib.util
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_fast.config.command_line import TRAIN, TRAIN_REWARD, Command
from grpo_fast.config.flags import split
from grpo_fast.errors import UserError
from grpo_fast.miniature.world import OBJECTIVES
from grpo_fast.run.metrics import read_rows
from tests.test_train import run_command
from tests.tiny import write_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TRAINERS: dict[str, Command[Any]] = {
    "grpo_fast.train": TRAIN,
    "grpo-fast": TRAIN,
    "grpo_fast.train_reward": TRAIN_REWARD,
    "grpo-fast-reward": TRAIN_REWARD,
}


def commands(text: str) -> list[list[str]]:
    """The words of every command of the shell's blocks."""
    found = []
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = shlex.split(line.strip(), comments=True)
            found += [words] if words else []
    return found


def trainer_flags(words: list[str]) -> tuple[Command[Any], list[str]] | None:
    """A trainer's command and what stands after it, where these words call one."""
    for place, word in enumerate(words):
        if word in TRAINERS and (words[place - 1] == "-m" if place else word.startswith("grpo-")):
            rest = [word for word in words[place + 1 :] if word not in ("...", "&")]
            ends = [rest.index(end) for end in (">", "|", "||") if end in rest]
            return TRAINERS[word], rest[: min(ends, default=None)]
    return None


def check_flags(words: list[str], where: str) -> bool:
    called = trainer_flags(words)
    if called is None:
        return False
    try:
        split([word for word in called[1] if word != "${words[@]}"], called[0].schema)
    except UserError as error:
        raise AssertionError(f"{where}: {' '.join(words)}: {error}") from error
    return True


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_flag_of_a_command_exists(page):
    text = page.read_text(encoding="utf-8")
    for words in commands(text):
        check_flags(words, page.name)
        for place, word in enumerate(words[:-1]):
            if word == "-m" and words[place + 1].split(".")[0] in ("grpo_fast", "benchmarks"):
                path = ROOT / words[place + 1].replace(".", "/")
                assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), words
    flags = [flag for flag in re.findall(r"`--([a-z]+\.[\w.-]+)", text) if flag != "section.field"]
    known = {name for command in (TRAIN, TRAIN_REWARD) for name in command.schema.kinds}
    mappings = TRAIN.schema.mappings | TRAIN_REWARD.schema.mappings
    for flag in flags:
        name = flag.replace("-", "_").replace(".no_", ".")
        assert name in known or any(name.startswith(f"{one}.") for one in mappings), f"{page.name}: --{flag}"


def test_commands_with_an_unknown_flag_would_be_found():
    with pytest.raises(AssertionError, match="unknown flag"):
        check_flags(commands("```sh\npython -m grpo_fast.train --optim.lrr 1\n```")[0], "here")


def anchors(path: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    made = {DOCS / "explanation" / "kernels.md": ROOT / "kernels" / "README.md"}  # taken in by docs/hooks.py
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path: Path = (page.parent / target).resolve() if target else page
        source = made.get(path, path)
        assert source.is_file(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(source), f"{page.name}: {link}"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": ([\w/.-]+\.md)$", text, re.M))
    assert named == {str(page.relative_to(DOCS)) for page in PAGES} | {"explanation/kernels.md"}


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the docs extra")
def test_every_setting_is_in_the_reference():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec and spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    for config, command in ((hooks.TrainConfig, TRAIN), (hooks.RewardConfig, TRAIN_REWARD)):
        rows = re.findall(r"^\| `--([\w.-]+)` \|.*\| (.*) \|$", hooks.settings_page(config), re.M)
        assert [flag.replace("-", "_") for flag, _ in rows] == list(command.schema.kinds)
        assert all(len(meaning) > 10 for _, meaning in rows)


@cache
def messages() -> list[str]:
    """Every text of the source, … where a value is put in."""
    found = []
    for path in (ROOT / "grpo_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def said(message: str) -> bool:
    """Whether the source has a text with these parts in this order."""
    parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
    pattern = re.compile(".*".join(parts), re.S)
    return any(pattern.search(text) for text in messages())


QUOTED = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M)


def test_there_are_messages_and_a_stranger_is_found():
    assert len(QUOTED) >= 30 and not said("reward function … has fallen asleep")


@pytest.mark.parametrize("message", QUOTED, ids=lambda message: message[:30])
def test_each_message_is_in_the_source(message):
    assert said(message)


def test_the_launch_files_are_sound():
    launch = DOCS / "launch"
    page = (DOCS / "how-to" / "several-gpus.md").read_text(encoding="utf-8")
    for path in launch.iterdir():
        assert f"docs/launch/{path.name}" in page
    script = launch / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True, timeout=10)
    sky = yaml.safe_load((launch / "skypilot.yaml").read_text(encoding="utf-8"))
    service, job = yaml.safe_load_all((launch / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    texts = [script.read_text(encoding="utf-8"), sky["setup"] + sky["run"], pod["containers"][0]["args"][0]]
    for text in texts:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=10)
        calls = [words for words in commands(f"```sh\n{text}```") if "torchrun" in words]
        assert calls and all(check_flags(words, "launch") for words in calls)
        for words in re.findall(r"words=\((.*)\)", text):
            split(shlex.split(words), TRAIN.schema)
        torchrun = {word for words in calls for word in words[: words.index("-m")] if word.startswith("--")}
        assert torchrun - {"--kill-on-bad-exit=1"} <= torchrun_flags(), torchrun


@cache
def torchrun_flags() -> set[str]:
    from torch.distributed.run import get_args_parser

    return {flag for action in get_args_parser()._actions for flag in action.option_strings}


def test_the_dockerfile_copies_what_is_there():
    lines = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {"grpo_fast", "kernels", "constraints.txt", "pyproject.toml"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in kept, name
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 2 and all("-c constraints.txt" in line for line in installs)
    assert any(line.startswith("USER ") for line in lines) and lines[-1].startswith("ENTRYPOINT")
    assert '"grpo_fast.train"' in lines[-1]


def test_a_run_leaves_what_the_reference_says(tmp_path):
    settings = write_config(tmp_path / "tiny.toml")
    flags = ["--output-dir", tmp_path, "--name", "run", "--run.steps", "2", "--run.eval-every", "1"]
    assert run_command("--config", settings, *flags) == 0
    pages = {
        name: (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")
        for name in ("metrics", "run-folder")
    }
    known = set(re.findall(r"`([\w/]+)`", pages["metrics"]))
    keys = {key for row in read_rows(tmp_path / "run" / "metrics.jsonl") for key in row}
    for name in OBJECTIVES:
        keys = {f"{key.removesuffix(name)}NAME" if key.endswith(f"/{name}") else key for key in keys}
    keys = {"loss/HEAD" if key == "loss/NAME" else key for key in keys}
    keys = {"time/NAME_s" if key.startswith("time/") and key != "time/step_s" else key for key in keys}
    assert "reward/NAME" in keys and keys <= known, keys - known
    listed = set(re.findall(r"`([\w.]+)/?(?:step-N/)?`", pages["run-folder"]))
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert "model" in made and made <= listed, made - listed
