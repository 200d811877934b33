"""`report.html`: one self-contained page about a run. `python -m grpo_fast.report RUN` makes it again.

It is made from the run's files alone (metrics.jsonl, samples.jsonl, summary.json, config.toml), so an
interrupted run has one too; a section whose numbers are missing is left out. The page holds no script and
forbids any (completions are hostile text), loads nothing, and follows the reader's light or dark setting.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from grpo_fast.errors import UserError
from grpo_fast.report.charts import Series, line_chart, stacked_chart
from grpo_fast.report.marks import Marks, marks_of, steps_of, warnings_of
from grpo_fast.report.reward_page import QUALITY_FILE, write_reward_report
from grpo_fast.report.template import is_number, page_template
from grpo_fast.run.command import Parser
from grpo_fast.run.metrics import PHASES, read_rows, read_summary, write_atomically
from grpo_fast.run.progress import PHASE_TITLES
from grpo_fast.run.shapes import METRICS, SAMPLES

Rows = Sequence[Mapping[str, Any]]

_PAIRS_OPEN, _PAIRS_MOST = 6, 40
_QUIET = "var(--line)"  # colour of a series that belongs to no objective
_SECOND = "var(--line-2)"
_EARLY_DETAILS = ("tokens_per_s", "trained_tokens", "memory_gib", "lr", "grad_norm")

# (title, what it is, {metric: name of its line}, value the axis reaches down to)
_POLICY_CHARTS: list[tuple[str, str, dict[str, str], float | None]] = [
    ("KL divergence", "from the reference policy, a token", {"kl": "KL"}, 0.0),
    ("Entropy", "of the policy, a token (nats)", {"entropy": "entropy"}, 0.0),
    ("Clipped tokens", "share of tokens", {"clip_low_frac": "low", "clip_high_frac": "high"}, 0.0),
    ("Probability ratio", "new to old policy", {"ratio_mean": "mean", "ratio_max": "max"}, None),
    (
        "Engine against trainer",
        "distance between the log-probs of the two, a token",
        {"mismatch_k3": "KL (k3)", "mismatch_mean": "mean |Δ|"},
        0.0,
    ),
    (
        "Effective sample",
        "share of the tokens that counts under the weights trainer / engine",
        {"mismatch_ess": "share"},
        None,
    ),
    ("Completion length", "tokens", {"length_mean": "mean", "length_max": "max"}, 0.0),
    ("Cut off", "share of completions at the length limit", {"truncated_frac": "cut"}, 0.0),
    (
        "Repeated outputs",
        "share of completions said twice in a group, of 4-grams said twice in a completion",
        {"duplicate_frac": "duplicates", "repetition": "4-grams"},
        0.0,
    ),
    ("Groups without signal", "share whose rewards are all alike", {"flat_groups_frac": "share"}, 0.0),
    ("Skipped", "completions that never reach the transformer", {"skipped_sequences": "completions"}, 0.0),
    ("Over-refusal", "harmless held-out prompts refused", {"eval/judge/refusal": "share"}, 0.0),
    ("Loss", "", {"loss": "loss"}, None),
    ("Gradient norm", "before clipping", {"grad_norm": "norm"}, 0.0),
    ("Learning rate", "", {"lr": "rate"}, 0.0),
]
# Whether the rewards still mean what they did when the reward model was trained.
_TRUST_CHARTS: list[tuple[str, str, dict[str, str], float | None]] = [
    (
        "Distance from the reward model's training",
        "mean over a step's completions; 1 is a typical held-out reply",
        {"distance": "distance"},
        0.0,
    ),
    (
        "Outside the reward model's training",
        "share of completions further out than 95% of held-out replies",
        {"outside_frac": "share"},
        0.0,
    ),
]
_SPEED_CHARTS: list[tuple[str, str, dict[str, str], float | None]] = [
    ("Throughput", "tokens a second", {"tokens_per_s": "tokens/s"}, 0.0),
    ("Memory", "peak so far, GiB", {"memory_gib": "GiB"}, 0.0),
]


def write_report(run_dir: Path | str) -> Path:
    """Write `run_dir/report.html` and return its path; UserError when the folder holds no run."""
    run = Path(run_dir)
    if not run.is_dir():
        raise UserError(
            f"{run}: expected the folder of a run, found {'a file' if run.exists() else 'nothing'}"
        )
    config = run / "config.toml"
    rows = read_rows(run / "metrics.jsonl", METRICS)
    summary = read_summary(run)
    if not rows and summary is None and not config.exists():
        raise UserError(
            f"{run} is not the folder of a run: it has no config.toml, metrics.jsonl or summary.json"
        )
    config_toml = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    html = render(run.resolve().name, rows, read_rows(run / "samples.jsonl", SAMPLES), summary, config_toml)
    write_atomically(run / "report.html", html)
    return run / "report.html"


def render(name: str, rows: Rows, samples: Rows, summary: Mapping[str, Any] | None, config_toml: str) -> str:
    """The page. Every string goes through the template's escaping, without control characters."""
    grpo = [row for row in rows if row.get("phase") == PHASES[-1]]
    judged = _judged(grpo, summary)
    names = list((summary or {}).get("objectives") or {})
    logged = [key.removeprefix("reward/") for row in grpo for key in row if key.startswith("reward/")]
    names = list(dict.fromkeys([*names, *logged]))
    colours = {objective: f"var(--c{i % 8})" for i, objective in enumerate(names)}
    pairs = _pairs(samples, names)
    said = warnings_of(grpo, (summary or {}).get("objectives") or {})
    marks = marks_of(said)
    return page_template("report.html.jinja").render(
        name=(summary or {}).get("name") or name,
        summary=summary,
        last=rows[-1] if rows else None,
        phase_titles=PHASE_TITLES,
        colours=colours,
        headline=_headline(summary),
        shares=_shares((summary or {}).get("phase_s") or _phase_seconds(rows)),
        reward_charts=_reward_charts(judged, colours, marks),
        warnings=[(step, text) for step, _, text in said],
        trust_charts=_trust_charts(grpo, colours, marks),
        policy_charts=_charts(judged, _POLICY_CHARTS, marks),
        speed_charts=[*_time_chart(grpo), *_charts(grpo, _SPEED_CHARTS)],
        early_charts=_early_charts(rows),
        other_charts=_other_charts(grpo),
        pairs=pairs[:_PAIRS_OPEN],
        more_pairs=pairs[_PAIRS_OPEN:_PAIRS_MOST],
        pair_count=len(pairs),
        config_toml=config_toml,
    )


def _headline(summary: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Before and after of each objective on one axis, in per cent of the axis: judge when all have one."""
    objectives = (summary or {}).get("objectives") or {}
    for source in ("judge", "reward"):
        found = {n: (o.get(f"{source}_before"), o.get(f"{source}_after")) for n, o in objectives.items()}
        if found and all(before and after for before, after in found.values()):
            break
    else:
        return None
    ends = [
        v
        for pair in found.values()
        for m in pair
        for v in [m.get("mean"), *(m.get("ci95") or [])]
        if v is not None
    ]
    if not ends:
        return None
    low, high = min(ends), max(ends)
    if source == "judge":
        low, high = min(low, 0.0), max(high, 1.0)
    span = (high - low) or 1.0

    def place(measured: Mapping[str, Any]) -> dict[str, float]:
        a, b = measured.get("ci95") or (measured["mean"], measured["mean"])
        return {
            "at": 100 * (measured["mean"] - low) / span,
            "from": 100 * (a - low) / span,
            "width": 100 * (b - a) / span,
        }

    usable = {n: p for n, p in found.items() if all(m.get("mean") is not None for m in p)}
    return {
        "source": source,
        "rows": {
            n: {"before": place(before), "after": place(after)} for n, (before, after) in usable.items()
        },
        "ticks": [(25 * i, low + span * i / 4) for i in range(5)],
    }


def _series(
    rows: Rows, key: str, name: str, colour: str, spread: str | None = None, marks: bool = False
) -> Series | None:
    """The metric over the steps that logged it, or None when no step did."""
    there = [row for row in rows if key in row]
    if not any(is_number(row[key]) for row in there):
        return None
    return Series(
        name=name,
        x=[row["step"] for row in there],
        y=[row[key] if is_number(row[key]) else None for row in there],
        colour=colour,
        spread=[1.96 * s if is_number(s := row.get(spread)) else 0.0 for row in there]
        if spread and spread in there[0]
        else None,
        marks=marks,
    )


def _chart(
    title: str,
    hint: str,
    lines: Sequence[Series | None],
    floor: float | None = None,
    events: Sequence[float] = (),
) -> list[dict[str, Any]]:
    present = [line for line in lines if line is not None]
    if not present:
        return []
    return [{"title": title, "hint": hint, "svg": line_chart(present, title, floor=floor, events=events)}]


def _charts(
    rows: Rows, wanted: Sequence[tuple[str, str, dict[str, str], float | None]], marks: Marks | None = None
) -> list[dict[str, Any]]:
    charts = []
    for title, hint, keys, floor in wanted:
        tones = (_QUIET, _SECOND)
        lines = [
            _series(rows, key, name, tones[i % 2], marks=key.startswith("eval/"))
            for i, (key, name) in enumerate(keys.items())
        ]
        charts += _chart(title, hint, lines, floor, steps_of(marks or {}, keys))
    return charts


def _judged(rows: Rows, summary: Mapping[str, Any] | None) -> Rows:
    """The steps with what the judge said before the first and after the last one."""
    ends: dict[str, dict[str, Any]] = {"before": {}, "after": {}}
    for name, objective in ((summary or {}).get("objectives") or {}).items():
        for when, found in ends.items():
            if (judged := objective.get(f"judge_{when}")) and is_number(judged.get("mean")):
                found[f"eval/judge/{name}"] = judged["mean"]
    refusal = (summary or {}).get("over_refusal") or {}
    for when, found in ends.items():
        if is_number(share := (refusal.get(when) or {}).get("mean")):
            found["eval/judge/refusal"] = share
    if not rows:
        return rows
    first, last = {"step": 0, **ends["before"]}, {**rows[-1], **ends["after"]}
    return [first, *rows[:-1], last]


def _reward_charts(rows: Rows, colours: Mapping[str, str], marks: Marks) -> list[dict[str, Any]]:
    charts = []
    for name, colour in colours.items():
        reward = _series(rows, f"reward/{name}", "reward", colour, f"reward_sem/{name}")
        judge = _series(rows, f"eval/judge/{name}", "judge", "var(--ink)", marks=True)
        events = steps_of(marks, ["reward/"])
        charts += [{**chart, "colour": colour} for chart in _chart(name, "", [reward, judge], None, events)]
    spread = [_series(rows, f"group_std/{name}", name, colour) for name, colour in colours.items()]
    return charts + _chart(
        "Spread in a group",
        "standard deviation of the rewards of one prompt",
        spread,
        0.0,
        steps_of(marks, ["group_std/"]),
    )


def _trust_charts(rows: Rows, colours: Mapping[str, str], marks: Marks) -> list[dict[str, Any]]:
    by_objective = (
        ("spread", "Uncertainty", "of the reward model, in each objective's unit"),
        ("multiplier", "Multipliers", "weight of the objectives with a floor"),
        ("floor_gap", "Below the floor", "by how much the mean reward misses it"),
    )
    charts = _charts(rows, _TRUST_CHARTS, marks)
    for key, title, hint in by_objective:
        lines = [_series(rows, f"{key}/{name}", name, colour) for name, colour in colours.items()]
        charts += _chart(title, hint, lines, 0.0, steps_of(marks, [f"{key}/"]))
    return charts


def _early_charts(rows: Rows) -> list[dict[str, Any]]:
    """One chart for each scalar of the phases before GRPO."""
    charts = []
    for phase in PHASES[:-1]:
        those = [row for row in rows if row.get("phase") == phase]
        for key in dict.fromkeys(key for row in those for key in row):
            if not _bookkeeping(key) and key not in _EARLY_DETAILS:
                charts += _chart(
                    f"{PHASE_TITLES[phase]}: {key}".capitalize(), "", [_series(those, key, key, _QUIET)]
                )
    return charts


def _other_charts(rows: Rows) -> list[dict[str, Any]]:
    """Whatever GRPO steps logged that no other chart shows."""
    shown = {key for _, _, keys, _ in [*_POLICY_CHARTS, *_TRUST_CHARTS, *_SPEED_CHARTS] for key in keys}
    prefixes = (
        "reward/",
        "reward_sem/",
        "group_std/",
        "eval/judge/",
        "spread/",
        "multiplier/",
        "floor_gap/",
        "warning/",
        "over/",
    )
    charts = []
    for key in sorted({key for row in rows for key in row}):
        if key not in shown and not _bookkeeping(key) and not key.startswith(prefixes):
            charts += _chart(key, "", [_series(rows, key, key, _QUIET)])
    return charts


def _time_chart(rows: Rows) -> list[dict[str, Any]]:
    """Seconds a step, stacked by phase. What no phase timer counted is "other".

    Phases of fewer than half of the steps (evaluation, checkpoints) would only be spikes and are left out.
    """
    timed = [row for row in rows if is_number(row.get("time/step_s"))]
    spent = {
        name: [s if is_number(s := row.get(f"time/{name}_s")) else 0.0 for row in timed]
        for name in _phase_seconds(timed)
    }
    layers = {name: values for name, values in spent.items() if 2 * sum(v > 0 for v in values) >= len(timed)}
    if not layers:
        return []
    rest = [row["time/step_s"] - sum(parts) for row, *parts in zip(timed, *spent.values(), strict=True)]
    if (typical := max(0.0, median(rest))) > 0.01 * median(row["time/step_s"] for row in timed):
        layers["other"] = [min(max(0.0, value), 3 * typical) for value in rest]  # loading is in the first one
    svg = stacked_chart(
        list(layers), [row["step"] for row in timed], list(layers.values()), "Seconds a step by phase"
    )
    legend = [(name, f"var(--tone-{i % 8})") for i, name in enumerate(layers)]
    left_out = ", ".join(name for name in spent if name not in layers)
    hint = f"seconds, without {left_out}" if left_out else "seconds"
    return [{"title": "Time a step", "hint": hint, "svg": svg, "legend": legend}]


def _phase_seconds(rows: Rows) -> dict[str, float]:
    """Total seconds of each phase timer, the longest first."""
    totals: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("time/") and key != "time/step_s" and is_number(value):
                name = key.removeprefix("time/").removesuffix("_s")
                totals[name] = totals.get(name, 0.0) + value
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _shares(phase_s: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(phase, seconds, per cent of all) the longest first."""
    known = {name: seconds for name, seconds in phase_s.items() if is_number(seconds)}
    whole = sum(known.values()) or 1.0
    return [(n, s, 100 * s / whole) for n, s in sorted(known.items(), key=lambda item: -item[1])]


def _pairs(samples: Rows, names: Sequence[str]) -> list[dict[str, Any]]:
    """Completions before and after for the same prompt, kinds of prompt taking turns, in the order logged.

    Each has a list of (objective, score, judge's score, per cent of the range seen): nothing is picked by how
    well it turned out.
    """
    sides: dict[str, dict[tuple[str, int], Mapping[str, Any]]] = {"before": {}, "after": {}}
    for sample in samples:
        if (side := sides.get(sample.get("when", ""))) is not None:
            same = sum(prompt == sample.get("prompt") for prompt, _ in side)
            side[sample.get("prompt", ""), same] = sample
    shown = [sample for side in sides.values() for sample in side.values()]
    ranges: dict[str, tuple[float, float]] = {}
    for name in names:
        given = [(sample.get("scores") or {}).get(name) for sample in shown]
        scores = [score for score in given if is_number(score)]
        if scores:
            ranges[name] = (min(scores), max(scores))

    def scored(sample: Mapping[str, Any]) -> list[tuple[str, float, float | None, float]]:
        scores, judge, found = sample.get("scores") or {}, sample.get("judge") or {}, []
        for name, (low, high) in ranges.items():
            if is_number(score := scores.get(name)):
                found.append((name, score, judge.get(name), 100 * (score - low) / ((high - low) or 1.0)))
        return found

    by_kind: dict[Any, list[dict[str, Any]]] = {}
    for key, before in sides["before"].items():
        if after := sides["after"].get(key):
            both = [{**side, "scored": scored(side)} for side in (before, after)]
            pair = {"prompt": key[0], "kind": before.get("kind"), "before": both[0], "after": both[1]}
            by_kind.setdefault(before.get("kind"), []).append(pair)
    turns = max((len(those) for those in by_kind.values()), default=0)
    return [those[i] for i in range(turns) for those in by_kind.values() if i < len(those)]


def _bookkeeping(key: str) -> bool:
    return key in ("phase", "step", "time_s") or key.startswith("time/")


def main(argv: list[str] | None = None) -> int:
    """`python -m grpo_fast.report RUN`."""
    parser = Parser(prog="python -m grpo_fast.report", description="Make a run's report.html again.")
    parser.add_argument("run", help="folder of the run, for example runs/miniature")
    run = Path(parser.parse_args(argv).run)
    print((write_reward_report if (run / QUALITY_FILE).exists() else write_report)(run))
    return 0
