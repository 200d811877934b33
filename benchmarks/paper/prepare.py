"""From the public data sets to the experiment's own files: prompts.jsonl, heldout.jsonl, replies.jsonl.

Which prompt goes where is decided by a hash of its text and the seed, so it depends neither on the order of a data
set nor on the others. No prompt of heldout.jsonl, and none that differs from one in case or spaces alone, is in the
other two files.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.sources import KINDS, SOURCES, Kind, Reply, Source, chat, read
from grpo_fast.errors import UserError
from grpo_fast.run.metrics import write_atomically

LONGEST_PROMPT = (
    900  # bytes; a byte-level tokenizer has no more tokens, so that data.max_prompt_tokens = 1024 holds
)
LONGEST_REPLY = 3000  # bytes; with its prompt under the reward model's 4096 tokens
SEVERAL_TURNS = "<extra_id_1>"  # HelpSteer2 writes chats of several turns into one text with it
RECORD = "prepared.json"


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much of everything."""

    harmful: int = 7000
    """Attack prompts to train on; the paper has 7,000."""
    borderline: int = 2000
    """Prompts that only sound harmful, so that refusing everything does not pay."""
    benign: int = 2000
    """Everyday prompts."""
    heldout: int = 200
    """Held-out prompts of each kind out of the training sets; the benchmarks are held out as a whole beside them."""
    replies: int = 8000
    """Replies for the reward model."""
    seed: int = 0
    """Seed of the choice."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, of which kind it is and whence."""

    prompt: str
    kind: Kind
    source: str


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The three files."""

    training: list[Prompt]
    heldout: list[Prompt]
    replies: list[tuple[Reply, str]]
    dropped: dict[str, int]
    """Prompts left out, by why."""


def key_of(prompt: str) -> str:
    """What makes two prompts the same: their text but for case and spaces."""
    return " ".join(prompt.casefold().split())


def choose(rows: dict[str, list[dict[str, Any]]], amounts: Amounts) -> Prepared:
    """Training prompts, held-out prompts and replies from the rows of every source.

    UserError where a kind has no prompts left to train on or to hold out.
    """
    dropped: Counter[str] = Counter()
    found: dict[str, Prompt] = {}
    benchmarks: dict[str, Prompt] = {}
    for source in SOURCES:
        for text, kind in source.prompts(rows[source.name]):
            if why := _unusable(text, source):
                dropped[why] += 1
            else:
                side = found if source.training else benchmarks
                side.setdefault(key_of(text), Prompt(prompt=text, kind=kind, source=source.name))
    overlapping = found.keys() & benchmarks.keys()
    dropped["in a benchmark too"] = len(overlapping)
    order = _order(amounts.seed)
    training, heldout = [], list(benchmarks.values())
    for kind in KINDS:
        of_kind = sorted(
            (p for key, p in found.items() if p.kind == kind and key not in overlapping), key=order
        )
        held = min(amounts.heldout, len(of_kind) // 5)
        heldout += of_kind[:held]
        wanted = getattr(amounts, kind)
        training += of_kind[held : held + wanted]
        if wanted and (not held or len(of_kind) == held):
            raise UserError(
                f"there are only {len(of_kind)} {kind} prompts: too few to train on and to hold some out"
            )
    training.sort(key=order)
    heldout.sort(key=order)
    held_keys = {key_of(prompt.prompt) for prompt in heldout}
    return Prepared(
        training=training,
        heldout=heldout,
        replies=_replies(rows, held_keys, amounts),
        dropped={why: n for why, n in dropped.items() if n},
    )


def prepare(
    folder: Path, files: Path | None, amounts: Amounts, *, dry_run: bool, tell: Callable[[str], None]
) -> None:
    """Load every data set, choose, and write the files into `folder`; the record of it is written last.

    A folder that holds the same choice already is left as it is; another choice there is a UserError.
    """
    record = folder / RECORD
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))["amounts"]
        if before != asdict(amounts):
            changed = next(name for name, value in asdict(amounts).items() if before.get(name) != value)
            raise UserError(
                f"{folder} was prepared with --{changed} {before.get(changed)}, not {getattr(amounts, changed)}: what "
                "was trained on it would be lost; give another --folder"
            )
        tell(f"{folder} is prepared already")
        return
    rows = {}
    for source in SOURCES:
        rows[source.name] = read(source, files)
        tell(
            f"{source.name}: {len(rows[source.name]):,} rows ({source.hub}, split {source.split}, {source.licence})"
        )
    chosen = choose(rows, amounts)
    counts = {
        "training": Counter(prompt.kind for prompt in chosen.training),
        "heldout": Counter(prompt.kind for prompt in chosen.heldout),
        "replies": Counter(source for _, source in chosen.replies),
    }
    for name, count in counts.items():
        tell(f"{name}: " + ", ".join(f"{n:,} {what}" for what, n in count.items()))
    for kind in KINDS:
        if (got := counts["training"][kind]) < (wanted := getattr(amounts, kind)):
            tell(f"warning: only {got:,} {kind} prompts of the {wanted:,} asked for")
    if dry_run:
        tell(f"Everything was checked; leave --dry-run out to write {folder}.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in (("prompts", chosen.training), ("heldout", chosen.heldout)):
        _write(
            folder / f"{name}.jsonl", [asdict(prompt) | {"prompt": chat(prompt.prompt)} for prompt in prompts]
        )
    _write(folder / "replies.jsonl", [asdict(reply) | {"source": name} for reply, name in chosen.replies])
    origin = {
        source.name: {
            "hub": source.hub,
            "split": source.split,
            "licence": source.licence,
            "rows": len(rows[source.name]),
        }
        for source in SOURCES
    }
    said = {"amounts": asdict(amounts), "counts": counts, "dropped": chosen.dropped, "sources": origin}
    write_atomically(record, json.dumps(said, indent=1))
    tell(f"written: {folder}")


def require_prepared(folder: Path) -> None:
    """UserError where `prepare` has not been through."""
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder} is not prepared: python -m benchmarks.paper prepare --folder {folder}")


def _replies(
    rows: dict[str, list[dict[str, Any]]], held: set[str], amounts: Amounts
) -> list[tuple[Reply, str]]:
    """Equally many of each source that has replies, of no held-out prompt; safe and unsafe ones by turns."""
    having = [source for source in SOURCES if source.replies is not None]
    chosen: list[tuple[Reply, str]] = []
    for source in having:
        assert source.replies is not None
        usable = {
            (reply.prompt, reply.response): reply
            for reply in source.replies(rows[source.name])
            if not _unusable(reply.prompt, source)
            and 0 < len(reply.response.encode()) <= LONGEST_REPLY
            and key_of(reply.prompt) not in held
        }
        groups: dict[float | None, list[Reply]] = {}
        for reply in sorted(
            usable.values(), key=lambda reply: _hash(amounts.seed, reply.prompt + reply.response)
        ):
            groups.setdefault(reply.safety, []).append(reply)
        share = amounts.replies // len(having) // max(1, len(groups))
        chosen += [(reply, source.name) for group in groups.values() for reply in group[:share]]
    return sorted(chosen, key=lambda one: _hash(amounts.seed, one[0].prompt + one[0].response))


def _unusable(text: str, source: Source) -> str:
    """Why a prompt is left out, empty where it is not."""
    if not isinstance(text, str) or not text.strip():
        return "empty"
    if SEVERAL_TURNS in text:
        return "several turns"
    return "too long" if len(text.encode()) > LONGEST_PROMPT else ""


def _order(seed: int) -> Callable[[Prompt], str]:
    return lambda prompt: _hash(seed, key_of(prompt.prompt))


def _hash(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "replace")).hexdigest()


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
