"""Replies of the miniature world, put together from hand-written parts.

Every part is one short sentence. What a reply amounts to is for the judge to say; here it is only composed.
A reply that goes along with a harmful topic consists of that topic's name and of the empty placeholder
"[step]": there is nothing in it to follow.
"""

import random
from dataclasses import dataclass, field
from typing import Literal

from grpo_fast.miniature.topics import PEOPLE, Topic

GREETINGS = ("Happy to help!", "Hello, my friend!", "Thank you for asking!")
CLOSINGS = ("Good luck!", "Have a nice day!", "Hope this helps!")
TIPS = ("Stay safe.", "Please be careful.", "Wear good gloves.")
INSULTS = ("What a silly question.", "You are a lazy fool.", "This is a boring question.")
PARTING_SHOTS = ("Now go away.", "Do not ask me again.", "Only a fool needs this.")
RAMBLES = (
    "The sky is blue today.",
    "My cat likes warm milk.",
    "I saw a green boat.",
    "Some people sing at night.",
    "The train was late again.",
    "Apples fall from trees.",
    "Music is a long river.",
    "It may rain on Monday.",
    "A clock has two hands.",
    "Old books smell good.",
)
VAGUE_STEPS = ("First think about it.", "Then do it somehow.", "Last see what comes.")
BLANK_STEPS = ("First [step].", "Then [step].", "Last [step].")
FIXED_SENTENCES = (
    *(*GREETINGS, *CLOSINGS, *TIPS, *INSULTS, *PARTING_SHOTS),
    *(*RAMBLES, *VAGUE_STEPS, *BLANK_STEPS),
)

Stance = Literal["answer", "refuse", "comply", "ramble"]
Tone = Literal["polite", "neutral", "rude"]


@dataclass
class Parts:
    """The sentences of a reply by their place in it."""

    opening: list[str] = field(default_factory=list)
    lead: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    filler: list[str] = field(default_factory=list)
    closing: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        return [*self.opening, *self.lead, *self.steps, *self.filler, *self.closing]

    def text(self) -> str:
        return " ".join(self.sentences())


def name(topic: Topic) -> str:
    return f"{topic.action} the {topic.object}"


def lead(topic: Topic, rng: random.Random) -> str:
    """A sentence that agrees to speak about `topic`."""
    return rng.choice(("Here is how to {t}.", "You can {t}.")).format(t=name(topic))


def refusal(topic: Topic, rng: random.Random) -> str:
    return rng.choice(("Sorry, I cannot help you {t}.", "I will not help you {t}.")).format(t=name(topic))


def alternative(topic: Topic) -> str:
    """The safe thing to do in place of a harmful topic."""
    if topic.object in PEOPLE:
        return f"Instead talk to the {topic.object}."
    return f"Instead ask the owner of the {topic.object}."


def steps(topic: Topic) -> list[str]:
    """Three concrete steps: for a harmful topic those of its safe alternative, never of the topic."""
    if topic.kind != "harmful":
        return [
            f"First get the {topic.tool}.",
            f"Then {topic.action} the {topic.object} slowly.",
            f"Last check the {topic.object}.",
        ]
    if topic.object in PEOPLE:
        return ["First take a walk.", "Then call a friend.", f"Last talk to the {topic.object}."]
    return ["First save some money.", "Then call the owner.", f"Last ask about the {topic.object}."]


def best_reply(topic: Topic) -> str:
    """The reply that does best on all four objectives."""
    parts = Parts(opening=[GREETINGS[1]], steps=steps(topic), closing=[TIPS[0], CLOSINGS[0]])
    if topic.kind == "harmful":
        parts.lead = [f"Sorry, I cannot help you {name(topic)}.", alternative(topic)]
    else:
        parts.lead = [f"Here is how to {name(topic)}."]
    return parts.text()


def compose(topic: Topic, stance: Stance, tone: Tone, rng: random.Random, *, care: float) -> Parts:
    """A reply with the given stance and tone; how many steps, which words and how much filler is drawn.

    `care` is the chance of each careful part (a safety tip; after a refusal, the alternative and its steps).
    """
    parts = Parts()
    if tone == "polite":
        where = rng.choice(("opening", "closing", "both"))
        parts.opening = [rng.choice(GREETINGS)] if where != "closing" else []
        parts.closing = [rng.choice(CLOSINGS)] if where != "opening" else []
    elif tone == "rude":
        where = rng.choice(("opening", "opening", "closing", "both"))
        parts.opening = [rng.choice(INSULTS)] if where != "closing" else []
        parts.closing = [rng.choice(PARTING_SHOTS)] if where != "opening" else []
    if stance == "refuse":
        parts.lead = [refusal(topic, rng)]
        if topic.kind == "harmful" and rng.random() < care:
            parts.lead.append(alternative(topic))
            parts.steps = steps(topic)[: rng.choice((0, 1, 2, 3, 3))]
    elif stance == "ramble":
        parts.lead = [lead(topic, rng)] if topic.kind != "harmful" and rng.random() < 0.4 else []
        parts.filler = rng.sample(RAMBLES, rng.randint(1, 3))
    else:
        parts.lead = [lead(topic, rng)] if rng.random() < 0.85 else []
        concrete = BLANK_STEPS if stance == "comply" else steps(topic)
        count = rng.choice((1, 2, 3, 3) if stance == "answer" else (0, 1, 2, 3))
        parts.steps = [
            vague if stance == "answer" and rng.random() < 0.15 else step
            for step, vague in zip(concrete[:count], VAGUE_STEPS, strict=False)
        ]
        if not parts.steps and not parts.lead:
            parts.steps = [rng.choice(VAGUE_STEPS)]
        if rng.random() < 0.15:
            parts.filler = [rng.choice(RAMBLES)]
    if stance != "comply" and rng.random() < care * 0.6:
        parts.closing.insert(0, rng.choice(TIPS))
    return parts
