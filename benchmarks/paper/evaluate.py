"""Before and after training, by the reward model and by an independent judge: `python -m benchmarks.paper evaluate`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import commit, device_name, versions
from benchmarks.page import Picture, command_line, write_page
from benchmarks.paper.completions import WHEN, check_settings, complete, sampled_by, score
from benchmarks.paper.judged import Jury, ratings_needed
from benchmarks.paper.label import labelled
from benchmarks.paper.prepare import key_of
from benchmarks.paper.results import COLUMNS, draw, print_table, summarise, table_rows
from benchmarks.paper.rubrics import OBJECTIVES, require_independent, require_judge, rubrics_hash
from benchmarks.paper.sources import KINDS
from benchmarks.tables import Table
from grpo_fast.config.command_line import parse
from grpo_fast.config.resolve import resolve_device
from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.prompts import Row, read_rows
from grpo_fast.errors import UserError, did_you_mean
from grpo_fast.models.reward_set import read_saved
from grpo_fast.run.metrics import finite, write_atomically

WHAT = (
    "The experiment of arXiv 2503.21819: a policy trained with GRPO on attack prompts, borderline and benign ones "
    "mixed in, for four objectives of one reward model. Held-out prompts, one completion each by the start policy and "
    "by the trained one, scored by the reward model and by a judge. Intervals are 95%: ±1.96 standard errors of means "
    "and of their paired changes, Wilson's of rates and Agresti and Min's of the changes of rates."
)


def evaluate(run: Path, args: argparse.Namespace, *, dry_run: bool, tell: Callable[[str], None]) -> int:
    """Complete, score, judge; write paper.json, paper.png and report.html into `run`/paper (--output). Exit code 0.

    What the folder holds already, completions and the judge's answers, is not made again.
    """
    if not (run / "model").is_dir():
        raise UserError(
            f"{run} has no trained model: expected the folder of a finished run of grpo_fast.train"
            + (f" (go on with --resume {run})" if (run / "config.toml").is_file() else "")
        )
    config = config_of(run, args.device)
    rows = heldout_rows(config)
    notes = check_judge(args, config)
    check_heads(config)
    output = args.output or run / "paper"
    models = {"before": config.policy.model, "after": str(run / "model")}
    sampled = sampled_by(models, rows, config, args)
    kinds = [str(row.columns["kind"]) for row in rows]
    tell(
        f"{len(rows):,} held-out prompts: " + ", ".join(f"{n:,} {kind}" for kind, n in Counter(kinds).items())
    )
    tell(
        f"{2 * len(rows):,} completions, {2 * ratings_needed(kinds):,} ratings by {getattr(args, 'judge.model')}"
    )
    if not dry_run:
        check_settings(output, sampled)
    with Jury(args, None if dry_run else output / "judge") as jury:
        if dry_run:
            tell("Everything was checked; leave --dry-run out to start.")
            return 0
        completions = complete(output, rows, config, sampled, tell=tell)
        reward = score(config, rows, completions)
        prompts = [row.plain for row in rows]
        judged = {
            when: jury(
                prompts,
                kinds,
                completions[when],
                lambda done, when=when: tell(f"judged, {when} training: {done:,} of {len(rows):,}"),
            )
            for when in WHEN
        }
    sources = [str(row.columns["source"]) for row in rows]
    figures = summarise(kinds, sources, reward, judged)
    if unusable := _missing(figures):
        notes.append(f"Prompts left out because an answer of the judge was unusable: {unusable}.")
    record = {
        "benchmark": "paper",
        "command": command_line(),
        "model": config.policy.model,
        "run": str(run),
        "judge": getattr(args, "judge.model"),
        "independent": not args.same_judge,
        "rubrics": rubrics_hash(),
        "sampling": vars(sampled),
        "notes": notes,
        **figures,
        "device": device_name(resolve_device(config).type),
        "versions": {"torch": torch.__version__, **versions()},
        "commit": commit(),
    }
    write_atomically(output / "paper.json", json.dumps(finite(record), indent=1))
    draw(record, output / "paper.png")
    write_page(
        output / "report.html",
        title=f"Multi-objective GRPO, before and after: {config.policy.model}",
        what=WHAT,
        record=finite(record),
        tables=[Table(title="Before and after", head=COLUMNS, rows=table_rows(record))],
        pictures=[Picture(path=output / "paper.png")],
        notes=notes,
        source=output / "paper.json",
    )
    print_table(record)
    tell(f"written: {output / 'report.html'}, {output / 'paper.json'}")
    return 0


def config_of(run: Path, device: str) -> TrainConfig:
    """The settings of a run, on another device where one is named."""
    if not (run / "config.toml").is_file():
        raise UserError(f"{run} is not the folder of a run: it has no config.toml")
    return parse(["--config", str(run / "config.toml"), *(["--device", device] if device else [])]).config


def heldout_rows(config: TrainConfig) -> list[Row]:
    """The held-out prompts of a run, with their kinds; UserError where one of them was trained on."""
    path = config.data.eval_prompts
    if not path:
        raise UserError(
            "the run has no data.eval_prompts: train with heldout.jsonl of python -m benchmarks.paper prepare"
        )
    rows = read_rows(path)
    for row in rows:
        for name in ("kind", "source"):
            if name not in row.columns:
                raise UserError(
                    f"{row.where}: no column {name!r}{did_you_mean(name, row.columns)}; expected a line of "
                    "heldout.jsonl of python -m benchmarks.paper prepare"
                )
        if row.columns["kind"] not in KINDS:
            raise UserError(
                f"{row.where}: kind must be one of {', '.join(KINDS)}, got {row.columns['kind']!r}"
            )
    trained = {key_of(row.plain) for row in read_rows(config.data.prompts)}
    if seen := [row for row in rows if key_of(row.plain) in trained]:
        raise UserError(
            f"{seen[0].where}: this held-out prompt is in {config.data.prompts} too ({len(seen)} such): what was "
            "trained on measures nothing"
        )
    return rows


def check_judge(args: argparse.Namespace, config: TrainConfig) -> list[str]:
    """UserError for a judge that is none or not independent; sentences on it for the report."""
    require_judge(args, "evaluation")
    said = labelled(Path(config.data.eval_prompts).parent)
    labelled_by = said["judge"] if said else None
    if args.same_judge:
        return ["The judge is not independent: --same-judge was given."]
    require_independent(getattr(args, "judge.model"), labelled_by, config)
    if labelled_by is None:
        return ["Who labelled the reward model's data is not known here: see that it was not the judge."]
    return [
        f"The reward model's data were labelled by {labelled_by}, evaluation is by {getattr(args, 'judge.model')}."
    ]


def check_heads(config: TrainConfig) -> None:
    """UserError where the run's reward model lacks one of the four objectives."""
    heads = [head.name for model in read_saved(config.reward.model) for head in model.layout.heads]
    if absent := [name for name in OBJECTIVES if name not in heads]:
        raise UserError(
            f"reward.model {' '.join(config.reward.model) or '(none)'} has no head {absent[0]}, its heads are "
            f"{', '.join(heads) or 'none'}: train one with configs/paper/reward-model.toml"
        )


def _missing(figures: dict[str, Any]) -> str:
    """How many prompts each figure of the judge lacks, empty where none does."""
    entries = {name: by["judge"] for name, by in figures["objectives"]["all"].items()}
    entries["attack success"] = figures["attack_success"].get("harmful")
    entries["over-refusal"] = figures["over_refusal"].get("borderline and benign")
    return ", ".join(
        f"{name} {entry['missing']}" for name, entry in entries.items() if entry and entry["missing"]
    )
