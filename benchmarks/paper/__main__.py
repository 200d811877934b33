"""The experiment of arXiv 2503.21819 with public data: docs/paper.md.

    python -m benchmarks.paper prepare                                    # prompts and replies from public data sets
    python -m benchmarks.paper sample --size 0.5b                         # replies of the start policy beside them
    python -m benchmarks.paper label --judge.url URL --judge.model A      # four labels for the reward model's replies
    python -m benchmarks.paper run --size 0.5b --judge.url URL --judge.model B     # reward model, training, evaluation
    python -m benchmarks.paper evaluate RUN --judge.url URL --judge.model B        # evaluation alone

Every command has --dry-run, and called again it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from benchmarks.paper.prepare import Amounts, prepare
from benchmarks.paper.rubrics import add_judge_flags
from grpo_fast.errors import UserError
from grpo_fast.run.command import Parser, prepare_libraries, run_command

FOLDER = Path("runs/paper")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0, or that of the stage that ended otherwise."""
    args = parser().parse_args(argv)
    console = Console(soft_wrap=True)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    if args.command == "prepare":
        amounts = Amounts(**{field.name: getattr(args, field.name) for field in fields(Amounts)})
        for name, value in vars(amounts).items():
            if name != "seed" and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")
        prepare(args.folder, args.files, amounts, dry_run=args.dry_run, tell=tell)
        return 0
    if args.command == "label":
        from benchmarks.paper.label import label

        label(args.folder, args, dry_run=args.dry_run, tell=tell)
        return 0
    prepare_libraries(0)
    if args.batch < 1:
        raise UserError(f"--batch must be at least 1, got {args.batch}")
    if args.command == "sample":
        from benchmarks.paper.sample import sample

        if args.prompts < 1:
            raise UserError(f"--prompts must be at least 1, got {args.prompts}")
        sample(args.folder, args, dry_run=args.dry_run, tell=tell)
        return 0
    if args.command == "run":
        from benchmarks.paper.run import run

        return run(args.folder, args, dry_run=args.dry_run, tell=tell)
    from benchmarks.paper.evaluate import evaluate

    return evaluate(args.run, args, dry_run=args.dry_run, tell=tell)


def parser() -> Parser:
    """The commands and their flags."""
    top = Parser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in (
        ("prepare", "public data sets to prompts, held-out prompts and replies"),
        ("sample", "replies of the start policy, to be labelled too"),
        ("label", "replies to ratings of the four objectives, by a judge of yours"),
        ("run", "reward model, training and evaluation of one size"),
        ("evaluate", "a run before and after training"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument(
            "--dry-run", action="store_true", help="check everything, say what would be done, stop"
        )
        if name != "evaluate":
            command.add_argument(
                "--folder", type=Path, default=FOLDER, help="folder of the experiment (%(default)s)"
            )
        if name == "prepare":
            _prepare_flags(command)
        elif name != "sample":
            add_judge_flags(command)
        if name in ("sample", "run"):
            _training_flags(command)
        if name == "sample":
            command.add_argument("--prompts", type=int, default=2000, help="how many (default %(default)s)")
            _sampling_flags(command, temperature=1.0, default="as in training")
        if name == "run":
            command.add_argument("--reward-model", type=Path, help="take this one instead of training it")
            command.add_argument(
                "--train-reward", default="", metavar="FLAGS", help="more flags of grpo_fast.train_reward"
            )
        if name == "evaluate":
            command.add_argument("run", type=Path, help="folder of a finished run")
        if name in ("run", "evaluate"):
            command.add_argument("--output", type=Path, help="folder of the evaluation (RUN/paper)")
            command.add_argument(
                "--same-judge",
                action="store_true",
                help="let the judge be the one that labelled; the report says so",
            )
            _sampling_flags(command, temperature=0.0, default="greedy")
    return top


def _prepare_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--files",
        type=Path,
        help="folder with the data sets' rows as files (beavertails.jsonl ...); none: the hub",
    )
    for field in fields(Amounts):
        command.add_argument(f"--{field.name}", type=int, default=field.default, help="(default %(default)s)")


def _training_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", choices=("0.5b", "7b", "14b"), required=True, help="of Qwen2.5")
    command.add_argument(
        "--train", default="", metavar="FLAGS", help="more flags of grpo_fast.train, in quotes"
    )


def _sampling_flags(command: argparse.ArgumentParser, *, temperature: float, default: str) -> None:
    command.add_argument("--device", default="", help="auto, cpu, cuda or cuda:N; none: the recipe's")
    command.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help=f"of the completions (default %(default)g: {default})",
    )
    command.add_argument("--max-new-tokens", type=int, help="longest completion (the training's)")
    command.add_argument("--seed", type=int, default=0, help="of the sampling")
    command.add_argument(
        "--batch", type=int, default=256, help="completions kept at once (default %(default)s)"
    )


if __name__ == "__main__":
    run_command(main)
