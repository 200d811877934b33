"""The shapes in which rated replies are published, each a row of `SCHEMAS` and one function.

A reader takes the records of one source and yields examples; heads are entered into the table as they are
met. The public ones: HelpSteer2 (arXiv 2406.08673), UltraFeedback (arXiv 2310.01377), BeaverTails (arXiv
2307.04657) and PKU-SafeRLHF (arXiv 2406.15513).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grpo_fast.data.prompts import Messages, check_text, checked_messages, checked_prompt
from grpo_fast.data.rated import (
    Comparison,
    HeadSpec,
    Notes,
    RatedExample,
    is_missing,
    is_number,
    label,
    listed,
    note,
    number,
    shown,
)
from grpo_fast.errors import UserError

REPLIES = ("response", "completion", "reply", "answer")  # the first that is there is the reply
INDEX_COLUMNS = {"", "Unnamed: 0", "__index_level_0__"}  # what pandas writes without being asked


@dataclass(frozen=True, kw_only=True)
class Table:
    """One source: its records, and the heads and remarks that reading them brings up."""

    source: str
    records: list[tuple[str, dict[str, Any]]]
    guessed: bool
    """Whether kinds are taken from the values (format columns), not from a published schema."""
    heads: dict[str, HeadSpec] = field(default_factory=dict)
    notes: Notes = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def typed(self) -> bool:
        """Whether numbers and texts are told apart by the file itself."""
        return Path(self.source).suffix.lower() != ".csv"


@dataclass(frozen=True, kw_only=True)
class Schema:
    """How a source is known and read."""

    read: Callable[[Table], Iterator[RatedExample]]
    needed: tuple[str, ...] = ()
    """A source whose first record has these columns is taken to be of this schema."""
    optional: tuple[str, ...] = ()


# ---- what the readers share ----


def _head(table: Table, spec: HeadSpec, where: str) -> HeadSpec:
    """Enters a head when it is met first."""
    if spec.name not in table.heads:
        if not spec.name.strip() or not spec.name.isprintable():
            raise UserError(f"{where}: {spec.name!r} is no name for a head: it must be printable")
        table.heads[spec.name] = spec
    return spec


def _labels(table: Table, values: dict[str, Any], specs: list[HeadSpec], where: str) -> dict[str, float]:
    found = {}
    for spec in specs:
        value = label(values.get(spec.name), _head(table, spec, where), where)
        if value is not None:
            found[spec.name] = value
    return found


def _prompt(columns: dict[str, Any], name: str, where: str) -> str | Messages:
    return checked_prompt(columns.get(name), where, name)


def _reply(value: Any, name: str, where: str) -> str:
    """A reply's text, which may be empty; a chat of that one answer says the same."""
    if isinstance(value, list) and value:
        earlier, value = _turns(value, where, name)
        if earlier:
            raise UserError(f"{where}: {name} must be one answer, got {len(earlier) + 1} messages")
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a text (it may be empty), got {shown(value)}")
    check_text(value, where, name, empty=True)
    return value


def _turns(value: Any, where: str, name: str) -> tuple[Messages, str]:
    """(what was said before, the answer) of a chat that ends with the assistant's answer."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {name} must be a list of chat messages, got {shown(value)}")
    messages = checked_messages(value, where, name)
    if messages[-1]["role"] != "assistant":
        role = shown(messages[-1]["role"])
        raise UserError(f"{where}: {name} must end with the assistant's reply, ends with {role}")
    return messages[:-1], messages[-1]["content"]


# ---- columns ----


def _columns(table: Table) -> Iterator[RatedExample]:
    """A column a head. `prompt` and a reply, or `messages` that end with the reply."""
    names = list(dict.fromkeys(name for _, columns in table.records for name in columns))
    reply = next((name for name in REPLIES if name in names), None)
    prompt = "prompt" if reply and "prompt" in names else "messages"
    if prompt not in names:
        raise UserError(
            f"{table.source}: needs a prompt column and one of {', '.join(REPLIES)} (or messages that end "
            f"with the reply), there are {listed(names) or 'none'}"
        )
    rest = [name for name in names if name not in (reply, "prompt", "messages")]
    specs = [spec for name in rest if (spec := _column_head(table, name)) is not None]
    ignored = [name for name in rest if all(spec.name != name for spec in specs)]
    if not specs:
        raise UserError(f"{table.source}: no column of numbers to learn from, there are {listed(names)}")
    if ignored:
        table.warnings.append(f"{table.source}: columns ignored, as they hold no labels: {listed(ignored)}")
    for where, columns in table.records:
        if reply:
            asked, text = _prompt(columns, prompt, where), _reply(columns.get(reply), reply, where)
        else:
            earlier, text = _turns(columns.get("messages"), where, "messages")
            asked = checked_prompt(earlier, where, "messages")
        labels = _labels(table, columns, specs, where)
        yield RatedExample(prompt=asked, replies=(text,), labels=(labels,), where=where)


def _column_head(table: Table, name: str) -> HeadSpec | None:
    """The head of a column, None for one of no numbers.

    Half of what is there must be numbers: in a column of texts a stray number is a text, in a column of
    numbers a stray text is a mistake.
    """
    given = [(where, columns[name]) for where, columns in table.records if not is_missing(columns.get(name))]
    numbers = sum(is_number(value, typed=table.typed) for _, value in given)
    if name in INDEX_COLUMNS or not given or 2 * numbers < len(given):
        return None
    spec = _head(table, HeadSpec(name=name, kind="regression"), given[0][0])
    if all(number(value, where, name) in (0, 1) for where, value in given):
        spec = table.heads[name] = replace(spec, kind="binary", low=0.0, high=1.0)
    return spec


# ---- public schemas ----

HELPSTEER2 = [
    HeadSpec(name=name, kind="regression", low=0.0, high=4.0)
    for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
]
IS_SAFE = HeadSpec(name="is_safe", kind="binary", low=0.0, high=1.0)
SEVERITY = HeadSpec(name="severity", kind="ordinal", low=0.0, high=3.0)


def _helpsteer2(table: Table) -> Iterator[RatedExample]:
    for where, columns in table.records:
        labels = _labels(table, columns, HELPSTEER2, where)
        replies = (_reply(columns.get("response"), "response", where),)
        yield RatedExample(
            prompt=_prompt(columns, "prompt", where), replies=replies, labels=(labels,), where=where
        )


def _ultrafeedback(table: Table) -> Iterator[RatedExample]:
    """Several replies to an instruction, each rated 1 to 5 in some aspects.

    The system prompt under which a reply was written is left out: the ratings judge it by the instruction.
    """
    for where, columns in table.records:
        completions = columns.get("completions")
        if not isinstance(completions, list):
            raise UserError(f"{where}: completions must be a list, got {shown(completions)}")
        replies, labels = [], []
        for place, completion in enumerate(completions):
            name = f"completions[{place}]"
            if not isinstance(completion, dict):
                raise UserError(f"{where}: {name} must be an object, got {shown(completion)}")
            replies.append(_reply(completion.get("response"), f"{name}.response", where))
            labels.append(_aspects(table, completion.get("annotations"), where, f"{name}.annotations"))
        if not replies:
            note(table.notes, "row", "without completions left out", where)
            continue
        yield RatedExample(
            prompt=_prompt(columns, "instruction", where),
            replies=tuple(replies),
            labels=tuple(labels),
            where=where,
        )


def _aspects(table: Table, annotations: Any, where: str, name: str) -> dict[str, float]:
    """{aspect: rating} of {aspect: {"Rating": "4"}}; of a list of such ratings the first."""
    found = {}
    if annotations is not None and not isinstance(annotations, dict):
        raise UserError(f"{where}: {name} must be an object of aspects, got {shown(annotations)}")
    for aspect, given in (annotations or {}).items():
        spec = _head(table, HeadSpec(name=aspect, kind="regression", low=1.0, high=5.0), where)
        first = (given[0] if given else None) if isinstance(given, list) else given
        if first is not None and not isinstance(first, dict):
            raise UserError(f"{where}: {name}.{aspect} must be an object with Rating, got {shown(given)}")
        value = label((first or {}).get("Rating"), spec, where, f"{name}.{aspect}.Rating")
        if value is not None:
            found[aspect] = value
    return found


def _beavertails(table: Table) -> Iterator[RatedExample]:
    """A reply is safe, or harmful in some of the categories: in these 1 is the bad end."""
    for where, columns in table.records:
        category = columns.get("category")
        if not isinstance(category, dict):
            raise UserError(f"{where}: category must be an object of true and false, got {shown(category)}")
        specs = [
            table.heads.get(name) or HeadSpec(name=name, kind="binary", low=0.0, high=1.0, better="low")
            for name in category
        ]
        if IS_SAFE.name in category:
            raise UserError(f"{where}: category must not name is_safe, which is a column of its own")
        labels = _labels(table, {**category, "is_safe": columns.get("is_safe")}, [*specs, IS_SAFE], where)
        replies = (_reply(columns.get("response"), "response", where),)
        yield RatedExample(
            prompt=_prompt(columns, "prompt", where), replies=replies, labels=(labels,), where=where
        )


def _pku_saferlhf(table: Table) -> Iterator[RatedExample]:
    """Two replies, each safe or not; which is better, and which is safer by how many levels of severity."""
    for where, columns in table.records:
        replies = tuple(_reply(columns.get(name), name, where) for name in ("response_0", "response_1"))
        _head(table, IS_SAFE, where)
        labels = tuple(
            {} if (safe := label(columns.get(name), IS_SAFE, where, name)) is None else {"is_safe": safe}
            for name in ("is_response_0_safe", "is_response_1_safe")
        )
        severity = [
            label(columns.get(name), SEVERITY, where, name)
            for name in ("response_0_severity_level", "response_1_severity_level")
        ]
        comparisons = []
        for head in ("better", "safer"):
            _head(table, HeadSpec(name=head, kind="pairwise"), where)
            choice = number(columns.get(f"{head}_response_id"), where, f"{head}_response_id")
            if choice is None:
                continue
            if choice not in (0, 1):
                got = shown(columns[f"{head}_response_id"])
                raise UserError(f"{where}: {head}_response_id must be 0 or 1, got {got}")
            if replies[0] == replies[1]:
                note(table.notes, "pair", "of equal replies skipped", where)
                continue
            better, margin = int(choice), 0.0
            mild, severe = severity[better], severity[1 - better]
            if head == "safer" and mild is not None and severe is not None:
                margin = severe - mild
                if margin < 0:
                    note(table.notes, "pair", "whose severity contradicts safer_response_id, margin 0", where)
            comparisons.append(
                Comparison(head=head, better=better, worse=1 - better, margin=max(margin, 0.0))
            )
        yield RatedExample(
            prompt=_prompt(columns, "prompt", where),
            replies=replies,
            labels=labels,
            comparisons=tuple(comparisons),
            where=where,
        )


def _preference(table: Table) -> Iterator[RatedExample]:
    """The chosen of two replies; by how much: `margin`, or `score_chosen` less `score_rejected`."""
    for where, columns in table.records:
        _head(table, HeadSpec(name="preference", kind="pairwise"), where)
        prompt, chosen, rejected = _chosen_and_rejected(columns, where)
        margin, high, low = (
            number(columns.get(name), where, name) for name in ("margin", "score_chosen", "score_rejected")
        )
        if margin is None:
            margin = high - low if high is not None and low is not None else 0.0
        if chosen == rejected:
            note(table.notes, "pair", "of equal replies skipped", where)
            continue
        if margin < 0:
            note(table.notes, "pair", "whose margin contradicts the choice, margin 0", where)
        pair = Comparison(head="preference", better=0, worse=1, margin=max(margin, 0.0))
        yield RatedExample(
            prompt=prompt, replies=(chosen, rejected), labels=({}, {}), comparisons=(pair,), where=where
        )


def _chosen_and_rejected(columns: dict[str, Any], where: str) -> tuple[str | Messages, str, str]:
    """(prompt, chosen, rejected) of two texts and a prompt, or of two chats that begin with the prompt.

    Chats of the answer alone need a prompt too. Where chats begin with turns, these are the prompt; a text
    in `prompt` beside them is left unread, messages there must be how both chats begin.
    """
    values = columns.get("chosen"), columns.get("rejected")
    if all(isinstance(value, str) for value in values):
        if columns.get("prompt") is None:
            raise UserError(f"{where}: chosen and rejected are texts, so a column prompt is needed")
        prompt = _prompt(columns, "prompt", where)
        return prompt, _reply(values[0], "chosen", where), _reply(values[1], "rejected", where)
    if not all(isinstance(value, list) and value for value in values):
        raise UserError(
            f"{where}: chosen and rejected must both be texts or both lists of chat messages, got "
            f"{shown(values[0])} and {shown(values[1])}"
        )
    (earlier, chosen), (other, rejected) = (
        _turns(value, where, name) for value, name in zip(values, ("chosen", "rejected"), strict=True)
    )
    if earlier != other:
        raise UserError(f"{where}: chosen and rejected must begin with the same turns and differ in the last")
    if not earlier:
        return _prompt(columns, "prompt", where), chosen, rejected
    given = columns.get("prompt")
    if isinstance(given, list) and earlier[: len(given)] != checked_messages(given, where, "prompt"):
        raise UserError(f"{where}: chosen and rejected do not begin with the messages of prompt")
    return checked_prompt(earlier, where, "chosen"), chosen, rejected


SCHEMAS = {
    "columns": Schema(read=_columns),
    "helpsteer2": Schema(
        read=_helpsteer2, needed=("prompt", "response", *(spec.name for spec in HELPSTEER2))
    ),
    "ultrafeedback": Schema(read=_ultrafeedback, needed=("instruction", "completions")),
    "beavertails": Schema(read=_beavertails, needed=("prompt", "response", "category", "is_safe")),
    "pku-saferlhf": Schema(
        read=_pku_saferlhf,
        needed=(
            "prompt",
            "response_0",
            "response_1",
            "is_response_0_safe",
            "is_response_1_safe",
            "better_response_id",
            "safer_response_id",
        ),
        optional=("response_0_severity_level", "response_1_severity_level"),  # the first releases have none
    ),
    "preference": Schema(
        read=_preference,
        needed=("chosen", "rejected"),
        optional=("prompt", "margin", "score_chosen", "score_rejected"),
    ),
}
