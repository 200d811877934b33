"""What the page of each benchmark's record shows: its title, a paragraph, tables, and the limits of its figures.

A benchmark without a row in `SHOWN` gets every set of medians that its record holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.cost import peer_table
from benchmarks.tables import Table

Record = Mapping[str, Any]
_NOISE = "Times are of a machine that does other things too; compare within one record, never between two."


def shown(record: Record) -> tuple[str, str, list[Table], list[str]]:
    """(title, what was done, tables, limits) of a record."""
    name = record.get("benchmark") or record["suite"]
    if name not in SHOWN:
        return str(name).replace("_", " "), f"A record of the benchmark {name}.", medians(record), [_NOISE]
    title, what, tables, notes = SHOWN[name]
    return title, what, tables(record), list(notes)


def medians(record: Any, path: tuple[str, ...] = ()) -> list[Table]:
    """A table of every `median_s` in the record, however deep, with quartiles where the samples are there."""
    if not isinstance(record, Mapping):
        return []
    tables = []
    found = record.get("median_s")
    if isinstance(found, Mapping) and found:
        samples = record.get("samples_s", {})
        first = next(iter(found.values()))
        rows = []
        for name, value in found.items():
            low, high = quartiles(samples.get(name, []))
            rows.append([name, 1000 * value, low and 1000 * low, high and 1000 * high, value / first])
        title = ", ".join(path) or "times"
        title = title[:1].upper() + title[1:]
        head = ["", "median, ms", "first quartile", "third quartile", "of the first row"]
        tables.append(Table(title=title, head=head, rows=rows))
    for key, value in record.items():
        tables += medians(value, (*path, str(key).replace("_", " ")))
    return tables


def quartiles(samples: list[float]) -> tuple[float | None, float | None]:
    """The first and third quartile; (None, None) of fewer than two samples."""
    if len(samples) < 2:
        return None, None
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def _cost(record: Record) -> list[Table]:
    from benchmarks.cost.tables import tables

    return tables(dict(record))


def _cost_steps(record: Record) -> list[Table]:
    rows = []
    for row in record["steps"]:
        name = f"{row['size']}, {row['algorithm'].replace('_', ' ')}"
        if row["error"]:
            rows.append([name, row["error"], *[None] * 6])
            continue
        phases, parts = row["phase_s"], row["memory"]["parts"]
        rows.append(
            [
                name,
                row["seconds"],
                phases["generate"],
                phases["reward"] + phases["reference"] + phases["values"],
                phases["update"],
                sum(row["flops"].values()) / 1e15,
                row["memory"]["peak"] / 2**30,
                ", ".join(f"{part} {size / 2**30:.1f}" for part, size in parts.items() if size),
            ]
        )
    head = ["", "seconds", "generate", "look up", "update", "PFLOP", "GiB at most", "GiB by part"]
    return [Table(title="One step, the mean of two", head=head, rows=rows)]


def _cost_sizes(record: Record) -> list[Table]:
    rows = []
    for found in record["models"]:
        costs = found["algorithms"].values()
        rows += [
            [
                f"{found['model']}: PFLOP a step",
                *(f"{sum(each['pflop'].values()):.3g}" for each in costs),
            ],
            ["seconds a step", *(f"{each['step_s']:.3g}" for each in costs)],
            [
                "GiB on each GPU",
                *(f"{each['peak_gib']:.0f}" + ("" if each["fits"] else " (does not fit)") for each in costs),
            ],
            [f"GPU-hours of {found['steps']} steps", *(f"{each['gpu_hours']:.3g}" for each in costs)],
        ]
    first = record["models"][0]
    return [
        Table(
            title=f"{first['gpus']} GPUs, {first['work']}",
            head=["", *(name.replace("_", " ") for name in first["algorithms"])],
            rows=rows,
        )
    ]


def _cost_model(record: Record) -> list[Table]:
    bars = record["bars"]
    unit = {"flops": (1e9, "GFLOP"), "memory": (2**20, "MiB"), "seconds": (1.0, "s")}
    rows = []
    for row in record["cases"]:
        figures: list[Any] = []
        for key, (size, _) in unit.items():
            figures += [row["predicted"][key] / size, row["measured"][key] / size, f"{row['ratio'][key]:.3f}"]
        missed = [key for key, bar in bars.items() if abs(row["ratio"][key] - 1) > bar]
        rows.append([f"{row['algorithm']}, {row['name']}", *figures, ", ".join(missed) or "none"])
    columns = [
        f"{word} {name}" for _, name in unit.values() for word in ("predicted", "measured", "ratio of")
    ]
    note = "Bars: " + ", ".join(f"{key} within {bar:.0%}" for key, bar in bars.items()) + "."
    head = ["one step", *columns, "bars missed"]
    return [Table(title="Predicted and measured", head=head, rows=rows, note=note)]


def _step(record: Record) -> list[Table]:
    tables = medians({key: value for key, value in record.items() if key != "phases"})
    phases = record.get("phases", {}).get("median_s", {})
    if phases:
        whole = sum(phases.values())
        rows = [[name, 1000 * value, f"{value / whole:.1%}"] for name, value in phases.items()]
        tables.insert(
            min(2, len(tables)), Table(title="Where a step's time goes", head=["", "ms", "share"], rows=rows)
        )
    prefix = [
        [f"{name}, {row['prompt']}/{row['completion']}", f"{row['saved']:.1%}", f"{row['predicted']:.1%}"]
        for name, found in record.get("prefix", {}).items()
        for row in found
    ]
    if prefix:
        head = ["prompt/completion tokens", "time saved", "tokens saved"]
        tables.append(Table(title="Shared prompts", head=head, rows=prefix))
    bars = [[name, bar["reached"], bar["wanted"], bar["met"]] for name, bar in record.get("bars", {}).items()]
    if bars:
        tables.append(Table(title="Bars", head=["", "reached", "wanted", "met"], rows=bars))
    return tables


def _loss_head(record: Record) -> list[Table]:
    base = record["median_s"].get("products")
    rows = []
    for name, row in record["contenders"].items():
        if row["error"] is not None:
            rows.append([name, None, None, None, None, f"not measured: {row['error']}"])
            continue
        value = record["median_s"][name]
        error = f"{max(row['errors']):.0e}" if row["errors"] else None
        rows.append(
            [
                name,
                1000 * value,
                base and value / base,
                record["tflops"][name],
                record["extra_mib"][name],
                error,
            ]
        )
    shape = ", ".join(f"{letter} {n:,}" for letter, n in zip("NHV", record["shape"], strict=True))
    head = ["", "median, ms", "of the products", "TFLOP/s", "extra MiB", "largest error"]
    return [Table(title=f"{record['mode']} · {shape}", head=head, rows=rows)]


def _memory(record: Record) -> list[Table]:
    gib = 2**30
    rows = []
    for row in record["cases"]:
        if row["error"] or not row.get("predicted"):
            rows.append([row["name"], None, None, None, row["error"] or "not planned yet"])
            continue
        phases = ", ".join(f"{name} {size / gib:.2f}" for name, size in row["phases"].items())
        rows.append(
            [row["name"], row["predicted"]["peak"] / gib, row["peak"] / gib, row.get("ratio"), phases]
        )
    head = ["", "predicted, GiB", "measured, GiB", "ratio", "measured after each phase"]
    return [Table(title="Peak of two steps", head=head, rows=rows)]


def _body(record: Record) -> list[Table]:
    tables = []
    for shape, found in record["shapes"].items():
        rows = []
        for name, row in found["contenders"].items():
            if not row["samples_s"]:
                rows.append([name, None, None, None, f"not measured: {row['error']}"])
                continue
            ratio = found["eager_over"].get(name)
            difference = f"{row.get('difference', 0):.0e}"
            rows.append(
                [name, 1000 * found["median_s"][name], 1000 * min(row["samples_s"]), ratio, difference]
            )
        head = ["", "median, ms", "best, ms", "eager/it", "difference"]
        tables.append(Table(title=shape, head=head, rows=rows))
    return tables


def _reward(record: Record) -> list[Table]:
    tables = medians(record)
    accuracy = [[name, statistics.mean(found)] for name, found in record.get("accuracy", {}).items()]
    if accuracy:
        tables.append(Table(title="Accuracy on held-out pairs", head=["", "mean"], rows=accuracy))
    return tables


def _overoptimisation(record: Record) -> list[Table]:
    rows = []
    for run in record["runs"]:
        for name, title in (("mean", "one model"), ("lower_bound", "lower bound")):
            found = run[name]
            rows.append(
                [
                    f"seed {run['seed']}, {title}",
                    found["peak"],
                    found["peak_step"],
                    found["judge"][-1],
                    found["warned"],
                ]
            )
    head = ["", "judge at its peak", "at step", "judge at the end", "warned at step"]
    return [Table(title="What the judge says", head=head, rows=rows)]


def _variants(record: Record) -> list[Table]:
    from benchmarks.variants import table

    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table(dict(record)).split("\n")
    ]
    note = "Gains of the rule judge's means on held-out prompts: mean ± standard deviation over the seeds."
    return [Table(title="Gains", head=head, rows=rows, note=note)]


def _cost_peers(record: Record) -> list[Table]:
    head = ["", *peer_table.COLUMNS.values()]
    verdicts = " ".join(f"{line}." for line in peer_table.sentences(record))
    return [Table(title="Means over the seeds", head=head, rows=peer_table.rows(record), note=verdicts)]


def _ablations(record: Record) -> list[Table]:
    from benchmarks.ablations.record import tables

    return tables(record)


Shown = tuple[str, str, Callable[[Record], list[Table]], tuple[str, ...]]
SHOWN: dict[str, Shown] = {
    "cost": (
        "What alignment costs",
        "GRPO, PPO and DPO from the same start policies, on the same prompts, against the same reward models, and on "
        "the same held-out prompts; comparisons are paired by seed.",
        _cost,
        (_NOISE,),
    ),
    "cost-steps": (
        "One step of each algorithm",
        "Real sizes with random weights: as many sequences for each, one step that is not counted, then two that are.",
        _cost_steps,
        ("Lengths are fixed, nothing is learned: this is what a step costs, not what it is worth.",),
    ),
    "cost-sizes": (
        "What a step would cost",
        "FLOPs, memory and seconds of a step by the cost model; a step of PPO is two epochs of two minibatches, one of "
        "DPO trains on the best and the worst of a group, so steps are not of equal worth.",
        _cost_sizes,
        ("Rates are published peaks times assumed shares, NOT measured; quality is not part of the model.",),
    ),
    "cost-model": (
        "The cost model against real steps",
        "FLOPs, peak memory and seconds of one step, predicted from the architecture, the lengths and this machine's "
        "measured rates, and measured, each size in a process of its own.",
        _cost_model,
        (_NOISE, "Checked on one CPU; what it says of GPUs and of larger models is foreseen, not measured."),
    ),
    "step": (
        "A whole GRPO step",
        "One step (rollout, reward, update) against peers, generation, time by phase, and what shared prompts, packing "
        "and skipping save. Losses and gradients were compared before anything was timed; contenders took turns.",
        _step,
        (_NOISE,),
    ),
    "loss_head": (
        "Loss head",
        "Log-probs, loss and gradients of the vocabulary product, against the bare matrix products and peers. Every "
        "contender ran in a process of its own, was compared with float64 first, and took turns with the others.",
        _loss_head,
        (_NOISE,),
    ),
    "memory": (
        "Memory: planned and measured",
        "The planner's peak against that of two real steps, each configuration in a process of its own.",
        _memory,
        ("On a CPU the peak is the process's resident memory, runtime included.",),
    ),
    "body": (
        "The model's body",
        "Packed forward and backward of decoder layers: as they are, compiled, and with Liger's kernels. Every "
        "contender ran in a process of its own and took turns with the others.",
        _body,
        (_NOISE,),
    ),
    "reward-model-score": (
        "Reward model: scoring",
        "The same completions through the same checkpoint: packed with shared prompts, and in padded batches.",
        _reward,
        (_NOISE,),
    ),
    "reward-model-train": (
        "Reward model: training",
        "One epoch on the same preference pairs from the same weights, here and with TRL's reward trainer.",
        _reward,
        (_NOISE,),
    ),
    "overoptimisation": (
        "Over-optimisation",
        "GRPO without a KL term against a reward model that can be gamed, and against the lower bound of an ensemble; "
        "the rule judge, which neither sees, says what the replies are worth.",
        _overoptimisation,
        ("The miniature's small policy and reward models; a larger one may be gamed in other ways.",),
    ),
    "ablations": (
        "Which idea pays",
        "One step, and the same step with one idea removed at a time: the same weights, the same rollout, the same "
        "loss. Gradients, scores and log-probs were compared first, contenders took turns, and each one's memory was "
        "measured in a process of its own.",
        _ablations,
        (
            "The whole step is the sum of its parts (generation, scoring, advantages, update, optimizer); without an "
            "idea it is that sum and the difference between the part without it and the part with it.",
            "Memory is the process's high-water mark over what it held before, with its libraries loaded. AdamW's "
            "states, which every contender needs alike, are not in it.",
            "The reference is the policy itself, as at the start of a run, where the KL term's gradient is zero. With "
            "a KL term no sequence is without signal, so none is skipped: that is part of its price.",
            "Generation makes completions of one length. What sharing prompts and skipping save grows with the "
            "prompts' share of the tokens and with the share of groups without signal: both are in the record's work.",
            "Packed rows are as long as the token budget allows (here everything is one pass), padded batches as high "
            "as the record's padded_rows: where the latter hold fewer positions at once they also need less memory.",
            "FLOPs are those of products with weights; attention's own are left out.",
        ),
    ),
    "advantage-modes": (
        "Advantage modes",
        "Every mode trained with every seed from the same policy and the same reward model of that seed.",
        _variants,
        ("Quality on the miniature, by its rule judge.",),
    ),
    "cost-peers": (
        "PPO and DPO against TRL's",
        "The baselines of the cost comparison and TRL's trainers of the same algorithms, from the same start policy on "
        "the same data with the same hyper-parameters, examined by the same code.",
        _cost_peers,
        (
            _NOISE,
            "The miniature's small policy; what the duel cannot equalise is in the record under limits.",
        ),
    ),
}
