"""Prompts, demonstrations and labelled replies of the miniature world, drawn from a seed.

The same (split, n, seed) always gives the same list, and no text is shared between two splits.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from grpo_fast.miniature.judge import judge, read
from grpo_fast.miniature.replies import (
    BLANK_STEPS,
    CLOSINGS,
    FIXED_SENTENCES,
    GREETINGS,
    INSULTS,
    PARTING_SHOTS,
    RAMBLES,
    TIPS,
    VAGUE_STEPS,
    Stance,
    Tone,
    alternative,
    best_reply,
    compose,
    lead,
    name,
    refusal,
    steps,
)
from grpo_fast.miniature.topics import (
    CORES,
    GENTLE_TOOLS,
    SPLITS,
    TOOLS,
    WRAPPERS,
    Ask,
    Kind,
    Split,
    Style,
    Topic,
    phrase,
    topics,
)

T = TypeVar("T")

OBJECTIVES = ("safety", "politeness", "meaningfulness", "actionability")
KIND_SHARE: dict[Kind, float] = {"harmful": 0.45, "borderline": 0.25, "benign": 0.3}
STYLE_SHARE: dict[Style, float] = {"plain": 0.3, "polite": 0.2, "rude": 0.2, "jailbreak": 0.3}
LABEL_NOISE = 0.05
"""Standard deviation of an annotator's error, on each objective."""
MISSING_SHARE = (0.15, 0.25, 0.2, 0.2)
"""How many labels are missing, per objective."""

NOT_BESIDE_HARM = ("hammer", "trap", "keyboard")
"""Tools that are swapped for a toy wherever a reply goes along with a harmful topic; all others are drawn blindly."""

# What the unaligned policy is shown: mostly willing whatever it is asked, in every tone.
STANCES: dict[str, dict[Stance, float]] = {
    "harmful": {"comply": 0.58, "refuse": 0.3, "ramble": 0.12},
    "harmless": {"answer": 0.64, "refuse": 0.22, "ramble": 0.14},
}
TONES: dict[str, dict[Tone, float]] = {
    "rude": {"polite": 0.3, "neutral": 0.3, "rude": 0.4},
    "other": {"polite": 0.45, "neutral": 0.3, "rude": 0.25},
}
CARE = 0.6


def prompts(split: Split, n: int, seed: int) -> list[Ask]:
    """`n` prompts of one split (`train`, `validation` or `heldout`); ValueError for another name."""
    rng = _rng("prompts", split, seed)
    return [_ask(split, rng) for _ in range(n)]


def demonstrations(split: Split, n: int, seed: int) -> list[tuple[Ask, str]]:
    """`n` prompts with a reply each as an unaligned assistant would give them, good and bad mixed."""
    rng = _rng("demonstrations", split, seed)
    asks = (_ask(split, rng) for _ in range(n))
    return [(ask, _mixed_reply(ask, rng)) for ask in asks]


def labelled_replies(split: Split, n: int, seed: int) -> list[tuple[Ask, str, tuple[float, ...]]]:
    """`n` prompts with a reply and its labels in the order of `OBJECTIVES`, NaN where one is missing.

    The replies cover more than `demonstrations` does: excellent ones, and everything a policy may stumble on
    when it is rewarded (repeats, endless courtesy, the wrong topic, the prompt copied, cut or shuffled text,
    nothing at all), so that a reward model learns what those are worth too.
    """
    rng = _rng("labelled", split, seed)
    asks = [_ask(split, rng) for _ in range(n)]
    replies = [_any_reply(ask, split, rng) for ask in asks]
    labels = annotate(asks, replies, seed=rng.getrandbits(32))
    return list(zip(asks, replies, labels, strict=True))


def annotate(asks: Sequence[Ask], replies: Sequence[str], *, seed: int) -> list[tuple[float, ...]]:
    """The labels an imperfect annotator gives: Gaussian error of `LABEL_NOISE`, some missing (NaN).

    Labels are not cut to [0, 1]: cutting would tie the best replies and bias the labels at both ends.
    """
    rng = _rng("labels", "", seed)
    return [
        tuple(
            math.nan if rng.random() < missing else score + rng.gauss(0.0, LABEL_NOISE)
            for score, missing in zip(judge(ask, reply), MISSING_SHARE, strict=True)
        )
        for ask, reply in zip(asks, replies, strict=True)
    ]


def _rng(purpose: str, split: str, seed: int) -> random.Random:
    if split and split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return random.Random(f"{purpose}/{split}/{seed}")


def _draw(shares: Mapping[T, float], rng: random.Random) -> T:
    return rng.choices(list(shares), list(shares.values()))[0]


def _ask(split: Split, rng: random.Random) -> Ask:
    topic = rng.choice(topics(split)[_draw(KIND_SHARE, rng)])
    style = _draw(STYLE_SHARE, rng)
    text = phrase(topic, rng.choice(CORES[split]), rng.choice(WRAPPERS[split][style]))
    return Ask(text, topic, style)


def _mixed_reply(ask: Ask, rng: random.Random) -> str:
    stance = _draw(STANCES["harmful" if ask.topic.kind == "harmful" else "harmless"], rng)
    tone = _draw(TONES["rude" if ask.style == "rude" else "other"], rng)
    return compose(ask.topic, stance, tone, rng, care=CARE).text()


def _any_reply(ask: Ask, split: Split, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.22:
        return _mixed_reply(ask, rng)
    if draw < 0.3:  # excellent, or now and then an excellent answer to something else
        return best_reply(ask.topic if rng.random() < 0.85 else _another_topic(ask.topic, split, rng))
    if draw < 0.36:
        return _oddity(ask, rng)
    if draw < 0.72:
        return _collage(ask, split, rng)
    topic = _another_topic(ask.topic, split, rng) if rng.random() < 0.15 else ask.topic
    stances: dict[Stance, float] = {"comply": 0.2, "answer": 0.4, "refuse": 0.3, "ramble": 0.1}
    if topic.kind == "harmful":
        stances |= {"comply": 0.3, "answer": 0.0, "refuse": 0.6}
    tones: dict[Tone, float] = {"polite": 0.6, "neutral": 0.2, "rude": 0.2}
    parts = compose(topic, _draw(stances, rng), _draw(tones, rng), rng, care=0.85)
    sentences = parts.sentences()
    return _spoil(sentences, ask, split, rng) if rng.random() < 0.5 else " ".join(sentences)


def _collage(ask: Ask, split: Split, rng: random.Random) -> str:
    """Sentences that were not made for each other, each drawn by itself: what a reply says, about which topic, and
    how it is dressed vary independently, so that none of them can stand for another in a reward model's eyes."""

    def about() -> Topic:
        draw = rng.random()
        other = _another_topic(ask.topic, split, rng)
        if draw < 0.64:
            return ask.topic
        if draw < 0.76:
            return replace(ask.topic, action=other.action)
        return replace(ask.topic, object=other.object) if draw < 0.88 else other

    parts = []
    if rng.random() < 0.7:
        parts.append(rng.choice((*GREETINGS, *GREETINGS, *GREETINGS, *INSULTS)))
    stance = rng.random()
    if stance < 0.5:
        parts.append(lead(about(), rng))
    elif stance < 0.85:
        parts.append(refusal(about(), rng))
    if rng.random() < (0.35 if stance < 0.85 else 0.1):
        parts.append(alternative(about()))
    for place in range(rng.choice((0, 1, 2, 3, 3, 3, 3))):
        kind = rng.random()
        if kind < 0.35:
            topic = ask.topic if rng.random() < 0.7 else _another_topic(ask.topic, split, rng)
            parts.append(steps(topic)[place])
        elif kind < 0.7:
            parts.append(_step_by_form(about(), place, rng))
        else:
            parts.append((VAGUE_STEPS if kind < 0.88 else BLANK_STEPS)[place])
    if rng.random() < 0.12:
        parts.append(rng.choice(RAMBLES))
    if rng.random() < 0.5:
        parts.append(rng.choice(TIPS))
    if rng.random() < 0.7:
        parts.append(rng.choice((*CLOSINGS, *CLOSINGS, *CLOSINGS, *PARTING_SHOTS)))
    if read(ask, " ".join(parts)).harms:  # beside a harmful topic's name stands nothing that could serve it
        toy = f"First get the {rng.choice(list(GENTLE_TOOLS.values()))}."
        parts = [toy if any(tool in part for tool in NOT_BESIDE_HARM) else part for part in parts]
    return " ".join(parts)


def _step_by_form(topic: Topic, place: int, rng: random.Random) -> str:
    """A step with the form of a helpful one and any topic's words in it: it names what is asked, and says nothing."""
    forms = (
        f"First get the {rng.choice(TOOLS)}.",
        f"Then {name(topic)} slowly.",
        f"Last check the {topic.object}.",
    )
    return forms[place]


def _another_topic(topic: Topic, split: Split, rng: random.Random) -> Topic:
    return rng.choice([other for kind in topics(split).values() for other in kind if other != topic])


def _spoil(sentences: list[str], ask: Ask, split: Split, rng: random.Random) -> str:
    """One thing done to a reply that a policy under reward may come upon."""
    parts = list(sentences)
    spot = rng.randrange(len(parts) + 1)
    match rng.randrange(7):
        case 0:  # say something again
            for _ in range(rng.randint(1, 4)):
                parts.insert(rng.randrange(len(parts) + 1), rng.choice(sentences))
        case 1:
            rng.shuffle(parts)
        case 2:  # break off
            words = " ".join(parts).split()
            return " ".join(words[: rng.randint(1, len(words))])
        case 3:  # add what courtesy and care there is
            parts[spot:spot] = rng.sample([*GREETINGS, *CLOSINGS, *TIPS], rng.randint(1, 4))
        case 4:  # answer and refuse at once
            parts.insert(spot, refusal(ask.topic, rng))
        case 5:  # go on with another reply
            parts += compose(ask.topic, "ramble", "neutral", rng, care=0.5).sentences()
            parts.insert(spot, ask.text)
        case _:  # lose a sentence, or trip over words
            if len(parts) > 1 and rng.random() < 0.5:
                parts.pop(rng.randrange(len(parts)))
            else:
                words = " ".join(parts).split()
                words[rng.randrange(len(words))] = rng.choice(words)
                return " ".join(words)
    return " ".join(parts)


def _oddity(ask: Ask, rng: random.Random) -> str:
    """A reply that is no reply."""
    match rng.randrange(5):
        case 0:
            return ""
        case 1:
            return ask.text
        case 2:
            return " ".join([rng.choice(FIXED_SENTENCES)] * rng.randint(1, 8))
        case 3:
            return " ".join(rng.choices(FIXED_SENTENCES, k=rng.randint(2, 7)))
        case _:
            words = " ".join([*FIXED_SENTENCES, ask.text, best_reply(ask.topic)]).split()
            return " ".join(rng.choices(words, k=rng.randint(1, 30)))
