"""`python -m grpo_fast.report RUN` makes a run's report again."""

from grpo_fast.report.page import main
from grpo_fast.run.command import run_command

run_command(main)
