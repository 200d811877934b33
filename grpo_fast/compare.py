"""Runs side by side: `python -m grpo_fast.compare RUN RUN ...` prints a table and writes a page with their curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from grpo_fast.errors import UserError
from grpo_fast.report.compare_page import RunFiles, different_settings, outcomes, read_runs, render
from grpo_fast.run.command import Parser, run_command
from grpo_fast.run.metrics import write_atomically
from grpo_fast.run.terminal import Terminal
from grpo_fast.shown import plain_text


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exit code 0, or 2 after bad input."""
    run_command(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m grpo_fast.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page (%(default)s)")
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        raise UserError(f"two runs or more are needed, got {args.runs[0]} alone")
    runs = read_runs(args.runs)
    console = Terminal(soft_wrap=True)
    console.print(_table("what came of it", runs, outcomes(runs)))
    differing = different_settings(runs)
    console.print(
        _table("settings that differ", runs, differing) if differing else "All settings are the same."
    )
    write_atomically(args.output, render(runs))
    print(f"page: {args.output}")
    return 0


def _table(title: str, runs: Sequence[RunFiles], rows: Sequence[tuple[str, list[str]]]) -> Table:
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False)
    drawn.add_column("")
    for run in runs:
        drawn.add_column(Text(plain_text(run.name)))
    for name, cells in rows:
        drawn.add_row(*(Text(plain_text(cell)) for cell in (name, *cells)))
    return drawn


if __name__ == "__main__":
    main()
