"""The miniature world: splits that share nothing, draws that repeat, labels with noise and gaps."""

import math
import re

import numpy as np
import pytest

from grpo_fast.miniature import replies
from grpo_fast.miniature.judge import does_harm, is_refusal, judge, read
from grpo_fast.miniature.topics import (
    CORES,
    KINDS,
    SPLITS,
    STYLES,
    WRAPPERS,
    all_topics,
    topics,
)
from grpo_fast.miniature.world import (
    LABEL_NOISE,
    MISSING_SHARE,
    NOT_BESIDE_HARM,
    OBJECTIVES,
    annotate,
    demonstrations,
    labelled_replies,
    prompts,
)


def test_topics_are_split_without_overlap_and_held_out_ones_are_made_of_known_words():
    seen = [topic for split in SPLITS for kind in KINDS for topic in topics(split)[kind]]
    assert len(seen) == len(set(seen)) == len(all_topics())
    train = [topic for kind in KINDS for topic in topics("train")[kind]]
    for split in ("validation", "heldout"):
        for kind in KINDS:
            assert len(topics(split)[kind]) >= 10
            for topic in topics(split)[kind]:
                assert sum(t.action == topic.action and t.kind == kind for t in train) >= 2
                assert sum(t.object == topic.object and t.kind == kind for t in train) >= 2


def test_harm_is_in_the_pair_and_in_no_single_word():
    harmful = {topic for topic in all_topics() if topic.kind == "harmful"}
    others = [topic for topic in all_topics() if topic.kind != "harmful"]
    assert {t.action for t in harmful} <= {t.action for t in others}
    assert {t.object for t in harmful} <= {t.object for t in others}
    assert all(does_harm(t.action, t.object) == (t in harmful) for t in all_topics())


def test_phrasings_are_split_without_overlap_and_wrappers_go_with_every_kind():
    for table in (CORES, {s: [w for style in STYLES[1:] for w in WRAPPERS[s][style]] for s in SPLITS}):
        phrasings = [phrasing for split in SPLITS for phrasing in table[split]]
        assert len(phrasings) == len(set(phrasings))
    drawn = {(ask.topic.kind, ask.style) for ask in prompts("heldout", 1000, seed=0)}
    assert drawn == {(kind, style) for kind in KINDS for style in STYLES}


def test_no_text_is_shared_between_splits_and_held_out_words_are_known():
    texts = {split: {ask.text for ask in prompts(split, 4000, seed=1)} for split in SPLITS}
    assert not texts["train"] & texts["validation"]
    assert not (texts["train"] | texts["validation"]) & texts["heldout"]
    words = {split: {word for text in texts[split] for word in re.findall(r"\w+", text)} for split in SPLITS}
    assert words["validation"] | words["heldout"] <= words["train"]


def test_prompts_name_their_topic_and_begin_each_sentence_with_a_capital():
    for ask in prompts("train", 500, seed=2):
        assert f"{ask.topic.action} the {ask.topic.object}" in ask.text
        assert all(part[0].isupper() for part in re.split(r"[.?!] ", ask.text))


@pytest.mark.parametrize("draw", [prompts, demonstrations, labelled_replies])
def test_a_seed_gives_the_same_draw_and_another_seed_another(draw):
    assert repr(draw("train", 50, 3)) == repr(draw("train", 50, 3))
    assert repr(draw("train", 50, 3)) != repr(draw("train", 50, 4))
    assert repr(draw("train", 50, 3)) != repr(draw("heldout", 50, 3))
    with pytest.raises(ValueError, match="train, validation, heldout"):
        draw("test", 1, 0)


def test_demonstrations_leave_room_in_both_directions():
    shown = demonstrations("train", 4000, seed=0)
    means = np.array([judge(ask, reply) for ask, reply in shown]).mean(axis=0)
    assert ((means > 0.25) & (means < 0.68)).all(), means
    refused = [is_refusal(reply) for ask, reply in shown if ask.topic.kind != "harmful"]
    assert 0.15 < np.mean(refused) < 0.3


def test_labels_are_the_judge_with_noise_and_gaps():
    rows = labelled_replies("train", 4000, seed=5)
    labels = np.array([label for *_, label in rows])
    truth = np.array([judge(ask, reply) for ask, reply, _ in rows])
    assert labels.shape == (4000, len(OBJECTIVES))
    np.testing.assert_allclose(np.isnan(labels).mean(0), MISSING_SHARE, atol=0.02)
    errors = labels - truth
    np.testing.assert_allclose(np.nanstd(errors, axis=0), LABEL_NOISE, atol=0.005)
    np.testing.assert_allclose(np.nanmean(errors, axis=0), 0, atol=0.005)


def test_labelled_replies_cover_the_range_and_no_objective_is_another():
    rows = labelled_replies("heldout", 3000, seed=6)
    truth = np.array([judge(ask, reply) for ask, reply, _ in rows])
    assert (truth.std(0) > 0.25).all()
    assert (truth.min(0) < 0.1).all() and (truth.max(0) == 1).all()
    for column in truth.T:
        assert np.unique(column, return_counts=True)[1].max() < 0.35 * len(column)  # few ties
    assert np.abs(np.corrcoef(truth.T)[~np.eye(4, dtype=bool)]).max() < 0.92
    assert any(not reply for _, reply, _ in rows)


def test_annotate_labels_whatever_it_is_given():
    asks = prompts("train", 3, seed=0)
    labels = annotate(asks, ["", "\x00 ☃", "Stay safe."], seed=0)
    assert [len(label) for label in labels] == [4, 4, 4]
    assert all(math.isnan(value) or -1 < value < 2 for label in labels for value in label)


def test_going_along_with_a_harmful_topic_holds_nothing_but_its_name_and_blanks():
    blanks = {*replies.BLANK_STEPS, *replies.RAMBLES, *replies.GREETINGS, *replies.CLOSINGS}
    blanks |= {*replies.INSULTS, *replies.PARTING_SHOTS, *replies.VAGUE_STEPS}
    complied = 0
    for ask, reply in demonstrations("train", 3000, seed=7):
        if ask.topic.kind != "harmful" or is_refusal(reply):
            continue
        complied += 1
        for sentence in re.findall(r"[^.!]+[.!]", reply):
            named = f"{ask.topic.action} the {ask.topic.object}" in sentence
            allowed = named and ("Here is how to" in sentence or "You can" in sentence)
            assert allowed or sentence.strip() in blanks | set(replies.TIPS), reply
    assert complied > 500


@pytest.mark.parametrize("split", SPLITS)
def test_no_labelled_reply_gives_a_harmful_topic_a_tool_that_could_serve_it(split):
    harms = 0
    for ask, reply, _ in labelled_replies(split, 3000, seed=8):
        if read(ask, reply).harms:
            harms += 1
            assert not any(f"get the {tool}" in reply for tool in NOT_BESIDE_HARM), reply
    assert harms > 300


def test_excellent_replies_are_labelled_for_the_wrong_question_too():
    """Form alone must not earn labels: the same excellent sentences appear where they fit and where not."""
    rows = labelled_replies("train", 4000, seed=9)
    full = [(ask, r) for ask, r, _ in rows if {"First", "Then", "Last"} <= set(re.findall(r"\w+", r))]
    content = np.array([judge(ask, reply).meaningfulness for ask, reply in full])
    assert (content > 0.8).mean() > 0.1 and (content < 0.4).mean() > 0.2
