"""`report.html` of a reward model's run: which heads can be trusted, and why not the others.

It is made from the run's files alone; a section whose numbers are missing is left out. Like the page of a GRPO
run it holds no script, loads nothing and shows every text as text. The files, all but one of them optional:

- `quality.json`, one object with any of
  - `heads`: what `grpo_fast.trust.quality.trust_report` gives, {head: measures, verdict, reasons};
  - `probes`: what `grpo_fast.trust.probes.probe_verdicts` gives, {head: {probe: effect}};
  - `calibration`: {head: {"before", "after", "n"}}, expected calibration errors in the labels' unit;
  - `data`: {"warnings": [sentence], "counts": {what: number}};
  - `outside`: {which replies: {"share", "n"}}, the share of them unlike those of training;
- `metrics.jsonl`: rows with `step` and numbers. `name/HEAD` of several heads share a chart;
- `samples.jsonl`: held-out replies {"prompt", "completion", "scores": {head: number}, "labels": {head: number or
  null}, "kind"};
- `summary.json`: `name`, `status`, `steps`, `wall_s`, `tokens_per_s`, `peak_memory_gib`, `seed`, `environment`;
- `config.toml`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_fast.errors import UserError
from grpo_fast.report.charts import Series, heat_map, line_chart, reliability_chart, scatter_chart
from grpo_fast.report.template import figure, is_number, page_template
from grpo_fast.run.metrics import read_rows, read_summary, write_atomically
from grpo_fast.run.shapes import METRICS, SAMPLES, parsed

Rows = Sequence[Mapping[str, Any]]

QUALITY_FILE = "quality.json"
VERDICTS = {"trustworthy": "good", "weak": "fair", "untrustworthy": "bad"}  # and the chips' classes
_SAMPLES_OPEN, _SAMPLES_MOST = 6, 40
_QUIET = "var(--line)"


def write_reward_report(run_dir: Path | str) -> Path:
    """Write `run_dir/report.html` and return its path; UserError when the folder holds no such run."""
    run = Path(run_dir)
    quality = _read_quality(run)
    config = run / "config.toml"
    config_toml = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    rows = read_rows(run / "metrics.jsonl", METRICS)
    samples = read_rows(run / "samples.jsonl", SAMPLES)
    html = render(run.resolve().name, rows, samples, read_summary(run), quality, config_toml)
    write_atomically(run / "report.html", html)
    return run / "report.html"


def render(
    name: str,
    rows: Rows,
    samples: Rows,
    summary: Mapping[str, Any] | None,
    quality: Mapping[str, Any],
    config_toml: str,
) -> str:
    """The page. Every string goes through the template's escaping, without control characters."""
    heads = {head: _mapping(measures) for head, measures in _mapping(quality.get("heads")).items()}
    probes = {
        head: {probe: _mapping(effect) for probe, effect in _mapping(effects).items()}
        for head, effects in _mapping(quality.get("probes")).items()
    }
    data, shown = _mapping(quality.get("data")), _samples(samples)
    scored = [head for sample in shown for head, *_ in sample["scored"]]
    colours = {head: f"var(--c{i % 8})" for i, head in enumerate(dict.fromkeys([*heads, *probes, *scored]))}
    return page_template("reward.html.jinja").render(
        name=(summary or {}).get("name") or name,
        summary=summary,
        colours=colours,
        heads=[_headline(head, m, quality, probes) for head, m in heads.items()],
        tally=_tally(heads),
        warnings=[str(warning) for warning in _listed(data.get("warnings"))],
        counts=_mapping(data.get("counts")),
        reliability_charts=_reliability(heads, colours),
        length_charts=_lengths(heads, colours),
        correlation_charts=_correlations(heads),
        probes={head: _probe_cells(effects) for head, effects in probes.items()},
        probe_names=list(dict.fromkeys(probe for effects in probes.values() for probe in effects)),
        outside={
            k: v for k, v in _mapping(quality.get("outside")).items() if is_number(_mapping(v).get("share"))
        },
        training_charts=_training(rows, colours),
        samples=shown[:_SAMPLES_OPEN],
        more_samples=shown[_SAMPLES_OPEN:_SAMPLES_MOST],
        sample_count=len(shown),
        config_toml=config_toml,
    )


def _read_quality(run: Path) -> dict[str, Any]:
    path = run / QUALITY_FILE
    try:
        return parsed(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{run} is not the folder of a reward model's run: {QUALITY_FILE}: {error.strerror or error}"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: expected a JSON object ({error})") from error


def _headline(
    head: str,
    measures: Mapping[str, Any],
    quality: Mapping[str, Any],
    probes: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """A head's row of the first table."""
    by_choice = measures.get("kind") in ("binary", "pairwise")
    key = "pairwise_accuracy" if by_choice else "spearman"
    effects = probes.get(head, {})
    calibration = _mapping(_mapping(quality.get("calibration")).get(head))
    exploited = [probe for probe, effect in effects.items() if effect.get("verdict") == "exploitable"]
    pairwise = measures.get("kind") == "pairwise"
    return {
        "name": head,
        "verdict": measures.get("verdict"),
        "chip": VERDICTS.get(str(measures.get("verdict")), ""),
        "reasons": [str(reason) for reason in _listed(measures.get("reasons"))],
        "kind": measures.get("kind"),
        "order": _shown(measures.get(key)),
        "order_is": "of pairs right" if by_choice else "rank correlation",
        "order_interval": " to ".join(map(_shown, _listed(measures.get(f"{key}_ci95")))),
        "error": _shown(measures.get("mae")),
        "error_of_mean": _shown(measures["mae_of_mean"]) if is_number(measures.get("mae_of_mean")) else None,
        "ece": _shown(measures.get("ece")),
        "calibrated": _shown(calibration["after"]) if is_number(calibration.get("after")) else None,
        "length": _shown(measures.get("length_correlation")),
        "label_length": _shown(measures.get("label_length_correlation")),
        "probes": f"{len(exploited)} of {len(effects)}" if effects else "–",
        "exploited": ", ".join(probe.replace("_", " ") for probe in exploited),
        "n": measures.get("n_comparisons" if pairwise else "n"),
        "n_of": "comparisons" if pairwise else "labels",
    }


def _tally(heads: Mapping[str, Mapping[str, Any]]) -> list[tuple[int, str, str]]:
    """(how many heads, verdict, class of its chip), the good ones first."""
    verdicts = [measures.get("verdict") for measures in heads.values()]
    return [(verdicts.count(v), v, chip) for v, chip in VERDICTS.items() if v in verdicts]


def _reliability(heads: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    charts = []
    for head, measures in heads.items():
        bins = [
            (row["predicted"], row["observed"], row["n"])
            for row in map(_mapping, _listed(measures.get("bins")))
            if all(is_number(row.get(key)) for key in ("predicted", "observed", "n"))
        ]
        if bins:
            svg = reliability_chart(bins, f"{head}: label against score", colour=colours[head])
            hint = f"error {_shown(measures.get('ece'))}"
            charts.append({"title": head, "hint": hint, "svg": svg, "colour": colours[head]})
    return charts


def _lengths(heads: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    charts = []
    for head, measures in heads.items():
        points = [
            (row["length"], row["score"])
            for row in map(_mapping, _listed(measures.get("points")))
            if is_number(row.get("length")) and is_number(row.get("score"))
        ]
        if points:
            svg = scatter_chart(
                points, f"{head}: score against length", across="tokens", colour=colours[head]
            )
            hint = (
                f"scores r = {_shown(measures.get('length_correlation'))}, "
                f"labels r = {_shown(measures.get('label_length_correlation'))}"
            )
            charts.append({"title": head, "hint": hint, "svg": svg, "colour": colours[head]})
    return charts


def _correlations(heads: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The heads' correlations with one another, of the scores and of the labels."""
    charts = []
    for title, key in (("Scores", "head_correlation"), ("Labels", "label_head_correlation")):
        values = [
            [r if is_number(r := _mapping(measures.get(key)).get(other)) else None for other in heads]
            for measures in heads.values()
        ]
        if any(value is not None for row in values for value in row):
            svg = heat_map(list(heads), values, f"Correlations of the {title.lower()} of the heads")
            charts.append({"title": title, "hint": "Pearson's r between heads", "svg": svg})
    return charts


def _probe_cells(effects: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What decided about each probe: the change, or the distance to the median for a degenerate reply."""
    cells = {}
    for probe, effect in effects.items():
        degenerate = "over_median_std" in effect
        value = effect.get("over_median_std" if degenerate else "change_std")
        ends = effect.get("over_median_ci95" if degenerate else "ci95")
        cells[probe] = {
            "mean": value if is_number(value) else None,
            "ci95": ends if (ends := _listed(ends)) and all(map(is_number, ends)) else None,
            "exploitable": effect.get("verdict") == "exploitable",
        }
    return cells


def _training(rows: Rows, colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """A chart for each number that was logged over the steps, the loss first; heads share one."""
    groups: dict[str, dict[str, str]] = {}
    rows = [row for row in rows if is_number(row.get("step"))]
    for key in dict.fromkeys(key for row in rows for key in row):
        if key in ("step", "time_s", "phase") or key.startswith("time/"):
            continue
        head = next((head for head in colours if key.endswith(f"/{head}")), "")
        groups.setdefault(key.removesuffix(f"/{head}"), {})[key] = head or key
    charts = []
    for title in sorted(groups, key=lambda title: title != "loss"):
        lines = []
        for key, name in groups[title].items():
            there = [row for row in rows if key in row]
            values = [row[key] if is_number(row[key]) else None for row in there]
            if any(value is not None for value in values):
                steps, marks = [row["step"] for row in there], title.startswith("eval")
                colour = colours.get(name, _QUIET)
                lines.append(Series(name=name, x=steps, y=values, colour=colour, marks=marks))
        if lines:
            charts.append({"title": title, "hint": "", "svg": line_chart(lines, title)})
    return charts


def _samples(samples: Rows) -> list[dict[str, Any]]:
    """Each with (head, score, label, per cent of the scores' range on the page)."""
    given = [(sample, _mapping(sample.get("scores"))) for sample in samples]
    ranges: dict[str, list[float]] = {}
    for _, scores in given:
        for head, score in scores.items():
            if is_number(score):
                ranges.setdefault(head, []).append(score)
    shown = []
    for sample, scores in given:
        labels, scored = _mapping(sample.get("labels")), []
        for head, values in ranges.items():
            if is_number(score := scores.get(head)):
                share = (score - min(values)) / ((max(values) - min(values)) or 1.0)
                scored.append((head, _shown(score), _shown(labels.get(head)), 100 * share))
        shown.append({"scored": scored, **{key: sample.get(key) for key in ("prompt", "completion", "kind")}})
    return shown


def _shown(value: Any) -> str:
    return figure(value if is_number(value) else None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
