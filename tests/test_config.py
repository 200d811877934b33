"""The configuration: defaults, files, flags, every kind of mistake, recipes, and the way back to TOML."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from grpo_kernels import LossConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_fast.config import check as config_check
from grpo_fast.config import check_reward, reward_settings
from grpo_fast.config import settings as config_module
from grpo_fast.config.command_line import TRAIN_REWARD, parse
from grpo_fast.config.resolve import advantage_choice, loss_config
from grpo_fast.config.reward_settings import RewardConfig
from grpo_fast.config.rules import FieldError, flatten
from grpo_fast.config.settings import (
    LossSettings,
    OptimSettings,
    PolicySettings,
    RewardSettings,
    RunSettings,
    TrainConfig,
)
from grpo_fast.config.toml import to_toml
from grpo_fast.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.toml") if path.stem != "reward-model")
PRESETS = get_args(config_module.Preset)


def refused(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def recipe(folder: Path, text: str | bytes, name: str = "recipe.toml") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_no_argument_is_the_miniature():
    invocation = parse([])
    assert invocation.config == TrainConfig() and not invocation.dry_run and invocation.resume is None


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    path = recipe(
        tmp_path, 'seed = 3\n[optim]\nlr = 2\nbetas = [0, 0.5]\n[reward.weights]\nsafety = 1\n"a.b" = -0.5\n'
    )
    config = parse(["--optim.lr", "1e-5", "--config", path, "--reward.weights.safety=2", "--dry-run"]).config
    assert (config.seed, config.optim.lr, config.optim.betas) == (3, 1e-5, (0.0, 0.5))
    assert config.reward.weights == {"safety": 2.0, "a.b": -0.5}
    assert config.optim.warmup_steps == OptimSettings().warmup_steps


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--rollout.group-size", "4"], "rollout.group_size", 4),
        (["--rollout.group_size=4"], "rollout.group_size", 4),
        (["--policy.gradient-checkpointing"], "policy.gradient_checkpointing", True),
        (["--policy.no-gradient-checkpointing"], "policy.gradient_checkpointing", False),
        (["--run.wandb", "false"], "run.wandb", False),
        (["--optim.betas", "0.8", "0.9"], "optim.betas", (0.8, 0.9)),
        (["--rollout.stop-tokens", "</s>", "-x"], "rollout.stop_tokens", ("</s>", "-x")),
        (["--rollout.stop-tokens=--"], "rollout.stop_tokens", ("--",)),
        (["--reward.functions", "a.b:c", "d:e.f"], "reward.functions", ("a.b:c", "d:e.f")),
        (["--reward.weights", "a=1", "b=-2"], "reward.weights", {"a": 1.0, "b": -2.0}),
        (["--reward.weights", "a", "1", "b", "-2"], "reward.weights", {"a": 1.0, "b": -2.0}),
        (["--reward.weights.my.name", "-2"], "reward.weights", {"my.name": -2.0}),
        (["--reward.directions", "a=min"], "reward.directions", {"a": "min"}),
        (["--loss.ratio-cap", "None"], "loss.ratio_cap", None),
        (["--loss.ratio-cap", "2"], "loss.ratio_cap", 2.0),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--name", "my run"], "name", "my run"),
    ],
)
def test_how_flags_are_read(argv: list[str], name: str, value: object):
    assert flatten(parse(argv).config)[name] == value


def test_dry_run_and_resume(tmp_path: Path):
    (tmp_path / "config.toml").write_text(to_toml(replace(TrainConfig(), seed=9)))
    invocation = parse(["--resume", str(tmp_path), "--run.steps", "7"])
    assert (invocation.config.seed, invocation.config.run.steps, invocation.resume) == (9, 7, tmp_path)
    assert parse(["--dry-run"]).dry_run and not parse(["--no-dry-run"]).dry_run
    assert "does not exist" in refused(["--resume", str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    assert "has no config.toml" in refused(["--resume", str(tmp_path / "empty")])
    assert "cannot be given with --resume" in refused(["--resume", str(tmp_path), "--config", "x.toml"])
    run = str(Path(recipe(tmp_path, "seed = 3", name="config.toml")).parent)
    for flag in (
        "--seed",
        "--name",
        "--output-dir",
        "--optim.lr",
        "--reward.weights.a",
        "--miniature.hidden",
    ):
        assert refused(["--resume", run, flag, "1"]).startswith(
            f"{flag.replace('-dir', '_dir')} cannot be given with --resume"
        )
    changed = parse(
        ["--resume", run, "--run.steps", "9", "--device", "cpu", "--memory.optimizer", "host"]
    ).config
    assert (changed.seed, changed.run.steps, changed.device) == (3, 9, "cpu")
    assert changed.memory.optimizer == "host"


def test_lines_of_nested_and_dotted_keys(tmp_path: Path):
    path = recipe(tmp_path, "optim.eps = 1\n\n[reward.weights]\nsafety = 1\nnice = 'x'\n")
    assert refused(["--config", path]).endswith(f"({path}:3)")
    path = recipe(tmp_path, "optim.eps = 1\noptim.lr = 0\n")
    assert refused(["--config", path]).endswith(f"({path}:2)")


def test_a_given_model_changes_the_defaults_that_would_harm_it():
    argv = ["--policy.model", "org/model", "--data.prompts", "p.jsonl", "--reward.functions", "m:f"]
    full, lora = parse(argv).config, parse([*argv, "--policy.lora-rank", "8"]).config
    assert (full.optim.lr, lora.optim.lr, full.rollout.max_new_tokens) == (1e-6, 1e-5, 256)
    assert parse([*argv, "--optim.lr", "2e-6"]).config.optim.lr == 2e-6


OWN_MODEL = ["--policy.model", "m", "--data.prompts", "p", "--reward.functions", "m:f"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim.lr", "-1"], "optim.lr must be > 0, got -1.0 (command line)"),
        (["--optim.lr", "abc"], "optim.lr must be a number, got 'abc' (command line)"),
        (["--optim.lr", "nan"], "optim.lr must be finite, got nan (command line)"),
        (["--optim.lr"], "optim.lr must be a number, got nothing (command line)"),
        (["--optim.lr", "1", "2"], "optim.lr must be a number, got ['1', '2'] (command line)"),
        (["--seed", "1.5"], "seed must be a whole number, got '1.5' (command line)"),
        (["--dtype", "float16"], "dtype must be one of auto, float32, bfloat16, got 'float16'"),
        (["--rollout.group-size", "1"], "rollout.group_size must be >= 2, got 1 (command line)"),
        (["--optim.betas", "0.9", "1"], "optim.betas must be two numbers in [0, 1), got 0.9 1.0"),
        (["--optim.betas", "0.9"], "optim.betas must be 2 numbers, got [0.9] (command line)"),
        (["--rollout.top-p", "0"], "rollout.top_p must be in (0, 1], got 0.0 (command line)"),
        (["--rollout.group-sise", "4"], "unknown flag --rollout.group-sise; did you mean"),
        (["--lr", "4"], "unknown flag --lr; did you mean --optim.lr?"),
        (["--num_generations", "4"], "unknown flag --num_generations; did you mean --rollout.group-size?"),
        (["--dry-rum"], "unknown flag --dry-rum; did you mean --dry-run?"),
        (["--xyzzy"], "unknown flag --xyzzy"),
        (["train"], "unexpected argument 'train': settings are given as --section.field value"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu' (command line)"),
        (["--name", "a/b"], "name must be the name of one folder, got 'a/b' (command line)"),
        (["--reward.weights", "a=0"], "reward.weights must not all be 0: nothing would be"),
        (["--reward.weights", "a=inf"], "reward.weights.a must be finite, got inf (command line)"),
        (["--reward.weights", "a=x"], "reward.weights must be name = number pairs, got"),
        (["--reward.directions", "a=up"], "reward.directions must be name = max or min pairs, got"),
        (["--reward.functions", "f"], "reward.functions must be module:function, got 'f' (command line)"),
        (["--reward.functions", "m:f", "m:f"], "reward.functions names m:f twice (command line)"),
        (["--policy.no-merge-on-save", "x"], "policy.merge_on_save must be true or false, got"),
        (["--config"], "--config takes one path, got none"),
        (["--optim.minibatches", "99"], "optim.minibatches must be <= rollout.prompts_per_step"),
        (["--engine.kv-dtype", "fp8"], "engine.kv_dtype fp8 samples from a slightly different distribution"),
        (["--engine.merge-lora"], "engine.merge_lora needs policy.lora_rank"),
        (["--rollout.stop-strings", "a", ""], "rollout.stop_strings must not hold an empty text"),
        (["--miniature.heads", "3"], "miniature.hidden must be a multiple of 2 * miniature.heads"),
        (["--policy.model", "m", "--reward.model", "r"], "data.prompts must be given with policy.model"),
        (["--policy.model", "m", "--data.prompts", "p"], "reward needs reward.model, reward.functions or judge.url"),
        (["--data.prompts", "p"], "data.prompts needs policy.model: the miniature cannot read"),
        (["--policy.quantize", "nf4"], "policy.quantize needs policy.model"),
        ([*OWN_MODEL, "--policy.quantize", "nf4"], "policy.quantize needs policy.lora_rank: weights in 4 bits"),
        (["--memory.optimizer", "host", "--optim.optimizer", "adamw8bit"], "memory.optimizer host updates on the CPU"),
        (["--memory.optimizer", "cpu"], "memory.optimizer must be one of device, while_training, host"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_flag_is_one_line(argv: list[str], message: str):
    assert refused(argv).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlr = -1.0", "optim.lr must be > 0, got -1.0 ({path}:2)"),
        ("[optim]\nlr = '1'", "optim.lr must be a number, got '1' ({path}:2)"),
        ("[optim]\nlr = true", "optim.lr must be a number, got True ({path}:2)"),
        ("[run]\nsteps = 1e3", "run.steps must be a whole number, got 1000.0 ({path}:2)"),
        ("[optim]\nlearning_rate = 1", "unknown key optim.learning_rate in {path}:2; did you mean optim.lr?"),
        ("lr = 1", "unknown key lr in {path}:1; did you mean optim.lr?"),
        ("[rolout]\ngroup_size = 8", "unknown key rolout in {path}:1; did you mean rollout?"),
        ("[reward]\nweigths = {{}}", "unknown key reward.weigths in {path}:2; did you mean reward.weights?"),
        ("optim = 3", "optim must be a table ([optim]), got 3 ({path}:1)"),
        ("seed = {{a = 1}}", "seed must be a whole number, got {{'a': 1}} ({path}:1)"),
        ("[reward]\nweights = 3", "reward.weights must be name = number pairs, got 3 ({path}:2)"),
        ("a = 1\nb = = 2", "{path} is not valid TOML: Invalid value (at line 2, column 5)"),
        ("a = " + "[" * 5000, "{path} is not valid TOML: "),
        ("seed = " + "9" * 5000, "{path} is not valid TOML: "),
    ],
)
def test_a_mistake_in_a_file_names_file_and_key(tmp_path: Path, text: str, message: str):
    path = recipe(tmp_path, text.replace("{{", "{").replace("}}", "}"))
    assert refused(["--config", path]).startswith(message.format(path=path))


def test_files_that_cannot_be_read(tmp_path: Path):
    assert refused(["--config", str(tmp_path / "no.toml")]).endswith("no.toml: No such file or directory")
    assert refused(["--config", str(tmp_path)]).startswith("cannot read")
    path = recipe(tmp_path, b"seed = 1\nname = '\xff'")
    assert refused(["--config", path]) == f"{path}:2: not UTF-8 text"
    assert parse(["--config", recipe(tmp_path, b"\xef\xbb\xbfseed = 4")]).config.seed == 4


def test_a_mistake_is_laid_to_where_it_was_made(tmp_path: Path):
    path = recipe(tmp_path, "[rollout]\ngroup_size = 1\n[optim]\nlr = 0.1")
    assert refused(["--config", path, "--optim.lr", "1"]).endswith(f"({path}:2)")
    assert refused(["--config", path, "--rollout.group-size", "0"]).endswith("got 0 (command line)")
    assert parse(["--config", path, "--rollout.group-size", "2"]).config.rollout.group_size == 2


def test_truncated_sampling_needs_the_mismatch_correction():
    for flag in ("top-k=5", "top-p=0.9", "min-p=0.1"):
        message = refused([f"--rollout.{flag}"])
        assert (
            message.startswith(f"rollout.{flag[:5].replace('-', '_')} biases") and "loss.mismatch" in message
        )
        assert parse([f"--rollout.{flag}", "--loss.mismatch", "truncate"]).config.loss.mismatch == "truncate"
    assert {LossConfig.preset(name).mismatch for name in PRESETS} == {"none"}  # what the check relies on


def test_python_users_get_the_same_checks():
    with pytest.raises(FieldError, match=r"^optim.lr must be > 0, got -1.0$"):
        TrainConfig(optim=OptimSettings(lr=-1.0))
    with pytest.raises(FieldError, match=r"^reward needs"):
        TrainConfig(policy=PolicySettings(model="m"), run=RunSettings(steps=1))


@pytest.mark.parametrize(
    ("config", "ranges"), [(TrainConfig(), config_check._RANGES), (RewardConfig(), check_reward._RANGES)]
)
def test_every_range_names_a_field_and_every_number_has_one(config, ranges):
    values = flatten(config)
    assert ranges.keys() <= values.keys()
    numbers = {
        name
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert numbers <= ranges.keys()


@pytest.mark.parametrize("module", [config_module, reward_settings])
def test_every_field_has_its_line_of_help(module):
    tree = ast.parse(inspect.getsource(module))
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            body = [item for item in node.body if not isinstance(item, ast.FunctionDef)][1:]
            for item, text in zip(body[::2], body[1::2], strict=True):
                assert isinstance(item, ast.AnnAssign), ast.unparse(item)
                assert isinstance(text, ast.Expr) and "\n" not in ast.literal_eval(text.value)


@pytest.mark.parametrize(("command", "config"), [("TRAIN", TrainConfig()), ("TRAIN_REWARD", RewardConfig())])
def test_help_shows_every_flag(command: str, config):
    code = f"from grpo_fast.config.command_line import {command}, parse; parse(['--help'], {command})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for name in [*flatten(config), "config", "dry_run", "resume"]:
        assert f"--{name.replace('_', '-')}" in done.stdout
    assert "Peak learning rate" in done.stdout


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path):
    config = parse(["--config", str(path)]).config
    assert loss_config(config).kl_coef == (0.0 if path.stem == "qwen2.5-7b" else 0.04)
    assert advantage_choice(config) == ("gdpo", "group")
    if path.stem == "miniature":
        assert config == TrainConfig()
        return
    assert config.policy.model.startswith("Qwen/Qwen2.5-") and config.device == "cuda"
    assert list(config.reward.weights) == ["safety", "politeness", "meaningfulness", "actionability"]
    assert bool(config.policy.lora_rank) == path.stem.endswith("lora")


def test_there_are_recipes():
    assert len(RECIPES) == 5


def test_the_reward_model_recipe_is_valid():
    config = parse(["--config", str(CONFIGS / "reward-model.toml")], TRAIN_REWARD).config
    assert len(config.data.ratings) == 2 and config.data.rename == {"is_safe": "safety"}
    assert config.backbone.members > 1 and config.device == "cuda"


# ---- the way back ----


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    lr=st.floats(1e-300, 1e300),
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    weights=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4),
        st.floats(0.1, 9),
        max_size=3,
    ),
    cap=st.none() | st.floats(1.5, 9),
)
def test_toml_gives_the_configuration_back(
    tmp_path: Path, seed: int, lr: float, text: str, weights: dict[str, float], cap: float | None
):
    config = TrainConfig(
        seed=seed,
        optim=OptimSettings(lr=lr, betas=(0.5, 1e-9)),
        reward=RewardSettings(weights=weights, functions=("a:b", "c:d")),
        loss=LossSettings(ratio_cap=cap),
        policy=replace(TrainConfig().policy, model="m"),
        data=replace(TrainConfig().data, prompts="p", system_prompt=text),
        run=RunSettings(wandb=True),
    )
    assert parse(["--config", recipe(tmp_path, to_toml(config))]).config == config


_PIECES = [
    *(
        "[optim]",
        "[reward]",
        "[reward.weights]",
        "lr",
        "seed",
        "weights",
        "betas",
        "a",
        ".",
        " = ",
        ",",
        "\n",
    ),
    *("1", "-1", "1e400", "nan", "'x'", '""', "true", "1979-05-27", "[1, 2]", "[", "]", "{", "}"),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=50)
    | st.lists(st.sampled_from(_PIECES), max_size=14).map(lambda pieces: "".join(pieces).encode())
)
def test_any_bytes_give_a_configuration_or_a_user_error(tmp_path: Path, data: bytes):
    try:
        config = parse(["--config", recipe(tmp_path, data)]).config
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert tomllib.loads(to_toml(config))


@settings(max_examples=80, deadline=None)
@given(
    argv=st.lists(
        st.sampled_from(
            ["--optim.lr", "--seed", "--reward.weights", "--reward.weights.a", "--loss.kl", "--x"]
        )
        | st.sampled_from(
            ["--optim.betas", "--policy.merge-on-save", "--reward.functions", "--dry-run", "--="]
        )
        | st.text(max_size=6).filter(lambda text: text not in ("-h", "--help")),
        max_size=5,
    )
)
def test_any_arguments_give_a_configuration_or_a_user_error(argv: list[str]):
    try:
        parse(argv)
    except UserError as error:
        assert "\n" not in str(error)
