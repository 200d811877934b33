"""What a run's folder holds: its logs, its checkpoints, and the pages and displays made of them."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import shutil
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from benchmarks import page as benchmark_page
from grpo_fast import compare
from grpo_fast.config.settings import TrainConfig
from grpo_fast.config.toml import to_toml
from grpo_fast.dumps import KIND, VERSION
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.replay import read_dump
from grpo_fast.report.page import write_report
from grpo_fast.report.reward_page import write_reward_report
from grpo_fast.run import checkpoint
from grpo_fast.run.metrics import RunLogger
from grpo_fast.shown import plain_text
from grpo_fast.state import restore, save, saved_evaluation
from grpo_fast.watch import Watched
from tests.fuzz.target import Target

MEAN = {"mean": 0.5, "ci95": [0.4, 0.6]}
OBJECTIVE = {"weight": 1.0} | {
    f"{source}_{when}": MEAN for source in ("judge", "reward") for when in ("before", "after", "change")
}
FILES: dict[str, Any] = {
    "metrics.jsonl": [
        {"phase": "warm_start", "step": 1, "time_s": 0.5, "loss": 2.0, "time/step_s": 0.4},
        *(
            {
                "phase": "grpo",
                "step": step,
                "time_s": float(step),
                "reward/safety": 0.1 * step,
                "reward_sem/safety": 0.01,
                "eval/judge/safety": 0.2,
                "group_std/safety": 0.1,
                "loss": 0.5,
                "kl": 0.01,
                "warning/kl": "text",
                "tokens_per_s": 100.0,
                "memory_gib": 1.0,
                "distance": 1.0 + step / 4,
                "outside_frac": 0.05 * step,
                "spread/safety": 0.1 * step,
                "repetition": 0.05 * step,
                "time/update_s": 0.3,
                "time/step_s": 0.5,
            }
            for step in range(1, 13)
        ),
    ],
    "samples.jsonl": [
        {
            "when": when,
            "step": 0,
            "prompt": "ask",
            "completion": "reply",
            "scores": {"safety": 0.5},
            "judge": {"safety": 0.4},
            "kind": "benign",
            "finish_reason": "stop",
            "labels": {"safety": 1},
        }
        for when in ("before", "after")
    ],
    "summary.json": {
        "name": "x",
        "status": "finished",
        "steps": 3,
        "seed": 1,
        "wall_s": 3.0,
        "phase_s": {"update": 1.0, "generate": 2.0},
        "tokens_per_s": 100.0,
        "peak_memory_gib": 1.0,
        "prompts": 8,
        "objectives": {"safety": OBJECTIVE, "tone": OBJECTIVE},
        "mean_judge_change": MEAN,
        "over_refusal": {"prompts": 4, "before": MEAN, "after": MEAN, "change": MEAN},
        "reward_model": {"safety": {"mae": 0.1, "pearson": 0.9, "spearman": None, "n": 12}},
        "environment": {"torch": "2", "threads": 2},
    },
    "quality.json": {
        "heads": {
            "safety": {
                "verdict": "weak",
                "reasons": ["few"],
                "kind": "regression",
                "spearman": 0.5,
                "spearman_ci95": [0.4, 0.6],
                "mae": 0.1,
                "mae_of_mean": 0.3,
                "ece": 0.1,
                "n": 12,
                "length_correlation": 0.1,
                "bins": [{"predicted": 0.1, "observed": 0.2, "n": 3}],
                "points": [{"length": 3, "score": 0.2}],
                "head_correlation": {"safety": 1.0, "tone": 0.5},
            },
            "tone": {
                "verdict": "trustworthy",
                "kind": "pairwise",
                "pairwise_accuracy": 0.9,
                "n_comparisons": 4,
            },
        },
        "probes": {"safety": {"padding": {"verdict": "exploitable", "change_std": 0.5, "ci95": [0.4, 0.6]}}},
        "calibration": {"safety": {"before": 0.2, "after": 0.1, "n": 12}},
        "data": {"warnings": ["a warning"], "counts": {"replies": 3}},
        "outside": {"held out": {"share": 0.05, "n": 12}},
    },
    "evaluation_before.json": {
        "names": ["safety"],
        "completions": ["reply"],
        "finish_reasons": ["stop"],
        "rewards": [[0.5]],
        "judged": [{"safety": 0.5}],
    },
    "config.toml": 'name = "x"\nseed = 1\n\n[run]\nsteps = 3\n',
}


def written(name: str) -> bytes:
    content = FILES[name]
    if isinstance(content, str):
        return content.encode()
    rows = content if isinstance(content, list) else [content]
    return "\n".join(json.dumps(row) for row in rows).encode()


def _run(folder: Path, name: str, data: bytes, called: str = "run") -> Path:
    """A run's folder whose file `name` is hostile."""
    run = folder / called
    if not (run / "config.toml").exists():
        run.mkdir(exist_ok=True)
    for other in FILES:
        (run / other).write_bytes(written(other))
    (run / name).write_bytes(data)
    return run


def _resume(name: str):
    def run(data: bytes, folder: Path) -> None:
        logger = RunLogger.resume(_run(folder, name, data), phase="grpo", step=2)
        logger.step("grpo", 3, {"loss": 0.5})
        logger.close()
        shutil.rmtree(folder / "run")

    return run


def _page(write: Any, name: str):
    def run(data: bytes, folder: Path) -> None:
        page = write(_run(folder, name, data)).read_text(encoding="utf-8")
        assert (
            "<script" not in page.lower()
            and "javascript:alert" not in page.replace("&", "").split("<body>")[0]
        )

    return run


def _compare(name: str):
    def run(data: bytes, folder: Path) -> None:
        said = io.StringIO()
        other = _run(folder, "config.toml", written("config.toml"), "other")
        with redirect_stdout(said):
            compare._command(
                [str(_run(folder, name, data)), str(other), "--output", str(folder / "compare.html")]
            )
        assert plain_text(said.getvalue()) == said.getvalue(), "control characters were printed"

    return run


def _watch(name: str):
    def run(data: bytes, folder: Path) -> None:
        watched = Watched(_run(folder, name, data))
        watched.look()
        said = io.StringIO()
        Console(file=said, width=80).print(watched.panel(80))
        text = said.getvalue() + watched.line()
        assert plain_text(text) == text, "control characters were shown"

    return run


def _evaluation(data: bytes, folder: Path) -> None:
    found = saved_evaluation(_run(folder, "evaluation_before.json", data))
    assert found is not None
    for name in found.names:
        found.reward(name)
        found.judge(name)


# ---- checkpoints ----


def _trained() -> tuple[torch.nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    return model, Optimizer(list(model.parameters()), lr=0.1)


@functools.cache
def _saved() -> dict[str, bytes]:
    """The files of a checkpoint of a layer of two weights, after one step."""
    model, optimizer = _trained()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step(0.1)
    with tempfile.TemporaryDirectory() as place:
        save(Path(place), 3, model, optimizer, keep=1, carried={"a": {"b": 1.0}})
        path = checkpoint.latest(place)
        assert path is not None
        return {file.name: file.read_bytes() for file in path.iterdir()}


def _checkpoint(
    name: str, folder: Path, data: bytes, sound: dict[str, bytes] | None = None, kind: str = "checkpoints"
) -> Path:
    """The checkpoint with one file replaced; unless it is the manifest, the manifest vouches for it."""
    path = folder / "saved" / kind / "step-000003"
    path.mkdir(parents=True, exist_ok=True)
    files = (sound or _saved()) | {name: data}
    if name != "manifest.json":
        manifest = json.loads(files["manifest.json"])
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files["manifest.json"] = json.dumps(manifest).encode()
    for file, content in files.items():
        (path / file).write_bytes(content)
    return path


@functools.cache
def _dump() -> dict[str, bytes]:
    """The files of a step that was skipped: two prompts, three completions."""
    lengths = torch.tensor([2, 1, 3])
    batch = {
        "prompt_ids": torch.tensor([1, 2, 3]),
        "prompt_lengths": torch.tensor([2, 1]),
        "completion_ids": torch.arange(6),
        "completion_lengths": lengths,
        "prompt_of": torch.tensor([0, 0, 1]),
        "advantages": torch.tensor([0.5, -0.5, 1.0]),
        "old_logprobs": -torch.ones(6),
        "rollout_logprobs": -torch.ones(6),
        "losses": torch.tensor([float("nan")], dtype=torch.float64),
        "grad_norm": torch.tensor(1.0),
    }
    facts = {
        "version": VERSION,
        "step": 3,
        "processes": 1,
        "token_budget": 64,
        "normalizer": 3.0,
        "model": "",
    }
    state = {"dump": facts | {"config": to_toml(TrainConfig())}}
    with tempfile.TemporaryDirectory() as place:
        path = checkpoint.save(place, 3, {"model": {"w": torch.zeros(2)}, "batch": batch}, state, kind=KIND)
        return {file.name: file.read_bytes() for file in path.iterdir()}


def _replay(name: str):
    def run(data: bytes, folder: Path) -> None:
        dump = read_dump(_checkpoint(name, folder, data, _dump(), KIND))
        assert len(dump.rollout.completions) == len(dump.rollout.prompt_of)

    return run


def _load(name: str):
    def run(data: bytes, folder: Path) -> None:
        checkpoint.load(_checkpoint(name, folder, data))

    return run


def _restore(name: str):
    """Into the model it is of, as `--resume` does."""

    def run(data: bytes, folder: Path) -> None:
        model, optimizer = _trained()
        path = _checkpoint(name, folder, data)
        restore(path.parents[1], model, optimizer, {"a": {}})

    return run


def _record(data: bytes, folder: Path) -> None:
    (folder / "record.json").write_bytes(data)
    with mock.patch.object(benchmark_page, "LARGEST_INSIDE", 1 << 16):
        benchmark_page.page_of(folder / "record.json")


RECORD = {
    "benchmark": "made up",
    "device": "cpu",
    "date": "2026",
    "versions": {"torch": "2"},
    "rows": [{"a": 1, "b": [1, 2]}],
}
TARGETS = {
    **{
        f"run.resume.{name}": Target(
            run=_resume(name), corpus=lambda name=name: [written(name)], form="jsonl", share=0.5
        )
        for name in ("metrics.jsonl", "samples.jsonl")
    },
    "run.evaluation": Target(
        run=_evaluation, corpus=lambda: [written("evaluation_before.json")], form="json"
    ),
    **{
        f"{kind}.{name}": Target(
            run=make(name),
            corpus=lambda name=name: [written(name)],
            form="text" if name.endswith("toml") else "jsonl" if name.endswith("l") else "json",
            share=0.15,
        )
        for kind, make, names in (
            (
                "report",
                lambda name: _page(write_report, name),
                ("metrics.jsonl", "samples.jsonl", "summary.json", "config.toml"),
            ),
            (
                "reward_page",
                lambda name: _page(write_reward_report, name),
                ("metrics.jsonl", "samples.jsonl", "summary.json", "quality.json"),
            ),
            ("compare", _compare, ("metrics.jsonl", "summary.json", "config.toml")),
            ("watch", _watch, ("metrics.jsonl", "samples.jsonl", "summary.json", "config.toml")),
        )
        for name in names
    },
    **{
        f"{kind}.{name}": Target(
            run=make(name),
            corpus=lambda name=name: [_saved()[name]],
            form="json" if name.endswith("json") else "safetensors",
            share=share,
        )
        for kind, make, share in (("checkpoint", _load, 1.0), ("restore", _restore, 0.2))
        for name in ("manifest.json", "state.json", "model.safetensors", "optimizer.safetensors")
    },
    **{
        f"replay.{name}": Target(
            run=_replay(name),
            corpus=lambda name=name: [_dump()[name]],
            form="json" if name.endswith("json") else "safetensors",
            share=0.2,
        )
        for name in ("manifest.json", "state.json", "batch.safetensors", "model.safetensors")
    },
    "benchmark.record": Target(
        run=_record, corpus=lambda: [json.dumps(RECORD).encode()], form="json", share=0.3
    ),
}
