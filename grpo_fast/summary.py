"""The end of a run on disk: summary.json, the last samples, report.html."""

import platform
from importlib.metadata import version
from typing import Any

import torch

from grpo_fast import __version__
from grpo_fast.config.settings import TrainConfig
from grpo_fast.evaluate import Evaluation, compare
from grpo_fast.report.page import write_report
from grpo_fast.run.live import Run
from grpo_fast.run.metrics import peak_memory_gib
from grpo_fast.task import Task


def write_results(
    run: Run, config: TrainConfig, task: Task, before: Evaluation, after: Evaluation | None, *, steps: int
) -> None:
    """Write summary.json and report.html; without `after` the run was interrupted and nothing is compared."""
    if not run.world.is_first:
        return
    rows = [row for row in run.rows() if row["phase"] == "grpo"]
    generated = sum(row.get("generated_tokens") or 0 for row in rows)
    seconds = sum(row["time/step_s"] for row in rows)
    summary: dict[str, Any] = {
        "name": run.path.name,
        "status": "finished" if after else "interrupted",
        "steps": steps,
        "seed": config.seed,
        "prompt_format": "chat" if task.prompts[0].messages else "plain",
        "tokens_per_s": generated / seconds if seconds else None,
        "peak_memory_gib": peak_memory_gib(),
        "reward_model": (task.reward_report or {}).get("heads"),
        "environment": environment(task.policy.device),
    }
    if after:
        summary |= compare(before, after, task.scorer.weights.tolist())
    run.logger.summary(summary)
    write_report(run.path)


def sample_rows(when: str, step: int, task: Task, evaluation: Evaluation, n: int) -> list[dict[str, Any]]:
    """The first `n` held-out completions as rows of samples.jsonl."""
    rows = []
    for index, prompt in enumerate(task.heldout[:n]):
        judged = evaluation.judged[index] if evaluation.judged else None
        rows.append(
            {
                "when": when,
                "step": step,
                "prompt": prompt.plain,
                "completion": evaluation.completions[index],
                "scores": dict(zip(evaluation.names, evaluation.rewards[index], strict=True)),
                "judge": judged,
                "kind": prompt.columns.get("kind"),
                "finish_reason": evaluation.finish_reasons[index],
            }
        )
    return rows


def environment(device: torch.device) -> dict[str, Any]:
    """What the run ran on: versions, device, threads."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "grpo_fast": __version__,
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }
