"""Shell completion, asked of the shells themselves."""

import shutil
import subprocess
from typing import Any

import pytest

from grpo_fast.config.command_line import TRAIN, TRAIN_REWARD, Command, parse
from grpo_fast.config.completion import completion
from grpo_fast.errors import UserError


def in_bash(*words: str, command: Command[Any] = TRAIN) -> set[str]:
    """What bash offers for the last of the words."""
    script = completion(command.program, command.help, "bash")
    function = "_" + command.program.replace("-", "_")
    quoted = " ".join(f"'{word}'" for word in (command.program, *words))
    script += (
        f'COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; {function}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-uc", script], capture_output=True, text=True, check=True, timeout=10
    )
    assert not done.stderr
    return set(done.stdout.split())


def test_bash_completes_flags_and_choices():
    assert in_bash("--optim.we") == {"--optim.weight-decay"}
    assert in_bash("--no-dr") == {"--no-dry-run"} and "--rollout.no-ahead" in in_bash("--rollout.no")
    assert in_bash("--loss.preset", "gr") == {"grpo"}
    assert in_bash("--seed", "1", "--advantage.mode", "") >= {"gdpo", "scalarized"}
    assert in_bash("--optim.optimizer", "=") >= {"adamw", "adafactor"}  # --optim.optimizer=, as bash parts it
    assert in_bash("--optim.optimizer", "=", "adaf") == {"adafactor"}
    assert in_bash("--policy.model", "mod") == set()  # left to the shell, which completes paths
    assert in_bash("--run.epo", command=TRAIN_REWARD) == {"--run.epochs"}


def test_every_flag_offered_is_one():
    values = {"--config": None, "--resume": None, "--watch": None, "--print-completion": None, "--help": None}
    commands: tuple[Any, ...] = (TRAIN, TRAIN_REWARD)
    for command in commands:
        offered = in_bash("--", command=command)
        assert {"--" + name.replace("_", "-") for name in command.schema.kinds} | values.keys() <= offered
        for flag in offered - values.keys():
            try:
                parse([flag], command)
            except UserError as error:
                assert "unknown flag" not in str(error), flag


def test_bash_is_told_of_the_command():
    script = (
        completion("grpo-fast", TRAIN.help, "bash") + "complete -p grpo-fast; complete -p grpo-fast-reward"
    )
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=10)
    assert done.stdout.split()[-1] == "grpo-fast" and "-F _grpo_fast" in done.stdout


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish here")
def test_fish_completes():
    script = completion("grpo-fast", TRAIN.help, "fish")
    script += "complete -C 'grpo-fast --optim.we'; complete -C 'grpo-fast --loss.preset gr'"
    done = subprocess.run(["fish", "-N", "-c", script], capture_output=True, text=True, timeout=20)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["--optim.weight-decay", "grpo"]
    assert not done.stderr


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_zsh_takes_the_script():
    script = "autoload -U compinit; compinit -D -u\n" + completion("grpo-fast", TRAIN.help, "zsh")
    script += 'print -r -- "$_comps[grpo-fast]"'
    done = subprocess.run(["zsh", "-fc", script], capture_output=True, text=True, timeout=20)
    assert done.stdout.split() == ["_grpo_fast"] and not done.stderr


def test_another_shell_is_refused(capsys):
    with pytest.raises(UserError, match="bash, zsh, fish, got ksh"):
        parse(["--print-completion", "ksh"])
    with pytest.raises(SystemExit) as stop:
        parse(["--print-completion", "fish"])
    assert stop.value.code == 0 and "-l optim.lr -r -d 'Peak learning rate" in capsys.readouterr().out
