"""Ratings: every fault with its place, and any rows give ratings or a `UserError`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rating_cases import BEAVER, HELPSTEER, PKU, ROW, SAID, answer, heads_of, refused, scores, written

from grpo_fast.data.rated import prompt_key
from grpo_fast.data.ratings import hold_out_ratings, read_ratings
from grpo_fast.data.schemas import SCHEMAS
from grpo_fast.errors import UserError

# ---- faults ----


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "score": "good"}, ":3: score must be a number, got 'good'"),
        ({**ROW, "score": [1]}, ":3: score must be a number, got [1]"),
        ({**ROW, "score": float("inf")}, ":3: score must be a finite number, got inf"),
        ({**ROW, "score": "-1e999"}, ":3: score must be a finite number, got '-1e999'"),
        ({**ROW, "score": 10**400}, ":3: score must be a finite number, got 1000"),
        ({**ROW, "score": 1e31}, ":3: score must be a finite number, got 1e+31"),
        ({**ROW, "response": None, "score": 1}, ":3: response must be a text (it may be empty), got None"),
        ({"prompt": "p", "score": 1}, ":3: response must be a text (it may be empty), got None"),
        ({**ROW, "response": 5, "score": 1}, ":3: response must be a text (it may be empty), got 5"),
        (
            {**ROW, "response": "a\ud800", "score": 1},
            ":3: response has half of a surrogate pair, character 2",
        ),
        ({**ROW, "prompt": "\udfff", "score": 1}, ":3: prompt has half of a surrogate pair, character 1"),
        ({**ROW, "prompt": " ", "score": 1}, ":3: prompt is empty"),
        ({"response": "r", "score": 1}, ":3: prompt must be a text or a list of chat messages, got null"),
        ({**ROW, "prompt": [answer("a")], "score": 1}, ":3: prompt has no user's message to answer"),
        (
            {**ROW, "response": [SAID, answer("a")], "score": 1},
            ":3: response must be one answer, got 2 messages",
        ),
    ],
)
def test_a_fault_in_columns(tmp_path: Path, row: dict[str, Any], message: str):
    source = written(tmp_path / "c.jsonl", *scores(1, 2), row)
    assert refused(source).startswith(f"{source}{message}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, **HELPSTEER, "coherence": 5}, "coherence must be in 0 to 4, got 5"),
        ({**ROW, **HELPSTEER, "coherence": "-0.5"}, "coherence must be in 0 to 4, got '-0.5'"),
        ({**BEAVER, "category": {"animal_abuse": 2}}, "animal_abuse must be true or false, 1 or 0, got 2"),
        ({**BEAVER, "category": "animal_abuse"}, "category must be an object of true and false"),
        ({**BEAVER, "category": {"is_safe": True}}, "category must not name is_safe"),
        ({**BEAVER, "category": {"a\nb": True}}, "'a\\nb' is no name for a head"),
        ({**BEAVER, "category": {" ": True}}, "' ' is no name for a head"),
        ({**BEAVER, "is_safe": "perhaps"}, "is_safe must be a number, got 'perhaps'"),
        ({**PKU, "better_response_id": 2}, "better_response_id must be 0 or 1, got 2"),
        ({**PKU, "safer_response_id": -1}, "safer_response_id must be 0 or 1, got -1"),
        ({**PKU, "response_1_severity_level": 4}, "response_1_severity_level must be in 0 to 3, got 4"),
        ({**PKU, "is_response_1_safe": 3}, "is_response_1_safe must be true or false, 1 or 0, got 3"),
        ({**PKU, "response_1": None}, "response_1 must be a text (it may be empty), got None"),
        ({"instruction": "p", "completions": None}, "completions must be a list, got None"),
        ({"instruction": "p", "completions": ["a"]}, "completions[0] must be an object, got 'a'"),
        ({"instruction": "p", "completions": [{}]}, "completions[0].response must be a text"),
        (
            {"instruction": "p", "completions": [{"response": "a", "annotations": []}]},
            "completions[0].annotations must be an object of aspects, got []",
        ),
        (
            {"instruction": "p", "completions": [{"response": "a", "annotations": {"x": 3}}]},
            "completions[0].annotations.x must be an object with Rating, got 3",
        ),
        (
            {"instruction": "p", "completions": [{"response": "a", "annotations": {"x": {"Rating": "6"}}}]},
            "completions[0].annotations.x.Rating must be in 1 to 5, got '6'",
        ),
        (
            {"instruction": "", "completions": [{"response": "a", "annotations": {"x": {"Rating": "4"}}}]},
            "instruction is empty",
        ),
        ({"chosen": "a", "rejected": "b"}, "chosen and rejected are texts, so a column prompt is needed"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "chosen and rejected must both be texts or both lists"),
        ({"prompt": "p", "chosen": "a", "rejected": [answer("b")]}, "must both be texts or both lists"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "much"}, "margin must be a number, got 'much'"),
        ({"chosen": [SAID], "rejected": [SAID]}, "chosen must end with the assistant's reply, ends with 'user'"),
        ({"chosen": [answer("a")], "rejected": [answer("b")]}, "prompt must be a text or a list of chat messages"),
        (
            {"chosen": [SAID, answer("a")], "rejected": [{"role": "user", "content": "q"}, answer("b")]},
            "chosen and rejected must begin with the same turns",
        ),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, SAID],
                "chosen": [SAID, answer("a")],
                "rejected": [SAID, answer("b")],
            },
            "chosen and rejected do not begin with the messages of prompt",
        ),
        ({"chosen": [{"role": "user"}], "rejected": [SAID]}, "chosen[0] must be a message with role and content"),
        ({"messages": [SAID], "score": 1}, "messages must end with the assistant's reply, ends with 'user'"),
        ({"messages": "text", "score": 1}, "messages must be a list of chat messages, got 'text'"),
        ({"messages": [answer("b"), answer("a")], "score": 1}, "messages has no user's message to answer"),
        ({"text": "a", "score": 1}, "no format fits the columns text, score: give --data.format, one of columns, "),
        ({}, "no format fits the columns (none): "),
        ({**PKU, "chosen": "a", "rejected": "b"}, "pku-saferlhf and preference both fit the columns prompt, "),
    ],
)  # fmt: skip
def test_a_fault_in_a_schema(tmp_path: Path, row: dict[str, Any], message: str):
    source = written(tmp_path / "s.jsonl", row)
    told = refused(source)
    assert told.startswith(f"{source}:1: ") and message in told


def test_faults_of_a_whole_source(tmp_path: Path):
    empty = written(tmp_path / "empty.jsonl")
    assert refused(empty) == f"ratings file {empty} has no rows"
    assert refused("no.jsonl") == "ratings file no.jsonl does not exist"
    (tmp_path / "a.txt").write_text("x")
    assert "ratings file" in refused(str(tmp_path / "a.txt"))
    assert refused() == "no ratings are given: name at least one file or data set"
    good = written(tmp_path / "c.jsonl", *scores(1, 2))
    assert refused(good, format="helpster2").startswith("--data.format must be one of auto, columns, ")
    assert "did you mean helpsteer2?" in refused(good, format="helpster2")
    assert refused(good, format="preference") == (
        f"{good}:1: preference needs chosen, rejected, there are prompt, response, score"
    )
    assert "needs a prompt column and one of response" in refused(
        written(tmp_path / "n.jsonl", {"text": "a", "score": 1}), format="columns"
    )
    assert "no column of numbers to learn from, there are prompt, response" in refused(
        written(tmp_path / "t.jsonl", {**ROW, "id": "x"})
    )
    assert "every label is missing" in refused(
        written(tmp_path / "h.jsonl", {**ROW, **dict.fromkeys(HELPSTEER)})
    )


def test_labels_that_are_all_equal(tmp_path: Path):
    same = written(tmp_path / "same.jsonl", *scores(3, 3, 3))
    other = written(tmp_path / "other.jsonl", *scores(4, prompt="q"))
    assert refused(same) == (
        "nothing can be learned of head score (3 labels, all 3); rate more replies, or leave it out with "
        "--data.rename 'score='"
    )
    assert len(read_ratings([same, other]).examples) == 4
    both = written(tmp_path / "both.jsonl", *({**row, "b": index} for index, row in enumerate(scores(3, 3))))
    assert list(heads_of(read_ratings([both], rename={"score": ""}))) == ["b"]
    rows = ({**row, "b": index, "it's": 0} for index, row in enumerate(scores(3, 3)))
    assert refused(written(tmp_path / "two.jsonl", *rows)) == (
        "nothing can be learned of heads score (2 labels, all 3), it's (2 labels, all 0); rate more replies, "
        """or leave them out with --data.rename 'score=' 'it'"'"'s='"""
    )


# ---- anything ----

values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 6) | st.floats() | st.text(max_size=3)
    | st.sampled_from(["4", "N/A", "nan", "1_0", "\ud800", "assistant", "user", ""]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["role", "content", "response", "annotations", "Rating", "honesty", "is_safe", ""]),
        inner,
        max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
texts = st.sampled_from(["p", "q", "r", "s", "t", "", "p\n"])
chats = st.builds(
    lambda asked, said: [{"role": "user", "content": asked}, answer(said)], st.sampled_from(["p", "q"]), texts
)
completion = st.fixed_dictionaries(
    {
        "response": texts,
        "annotations": st.dictionaries(
            st.sampled_from(["x", "y"]),
            st.fixed_dictionaries({"Rating": st.sampled_from([1, 3.5, "2", "5", "N/A", None])}),
        ),
    }
)
LIKELY = {
    "prompt": st.sampled_from(["p", "q", "r", "s"]) | st.just([SAID]),
    "messages": chats,
    "response": texts,
    "reply": texts,
    "instruction": st.sampled_from(["p", "q", "r"]),
    "completions": st.lists(completion, max_size=3),
    "category": st.fixed_dictionaries({"a": st.booleans(), "b,c": st.booleans()}),
    "chosen": texts,
    "rejected": texts,
    "response_0": texts,
    "response_1": texts,
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]]]:
    """(format, rows) of the columns that the format reads: right ones, or some with anything put in."""
    name = draw(st.sampled_from(sorted(SCHEMAS)))
    schema = SCHEMAS[name]
    columns = [*(schema.needed or ("prompt", "response", "score", "x")), *schema.optional]
    if draw(st.booleans()):
        columns.append(draw(st.sampled_from(["messages", "score", "\ud800", "a\nb", "reply"])))
    usual = {column: LIKELY.get(column, st.integers(0, 1)) for column in columns}
    if name == "preference" and draw(st.booleans()):
        usual |= {"chosen": chats, "rejected": chats}
    rows = draw(st.lists(st.fixed_dictionaries(usual), min_size=1, max_size=8))
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        draw(st.sampled_from(rows))[draw(st.sampled_from(columns))] = draw(values)
    return draw(st.sampled_from([name, "auto"])), rows


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables(), kind=st.sampled_from(["", "binary", "ordinal", "pairwise"]), held=st.integers(0, 3))
def test_any_rows_give_ratings_or_a_user_error(
    tmp_path: Path, table: tuple[str, list[dict[str, Any]]], kind: str, held: int
):
    source = written(tmp_path / "fuzz.jsonl", *table[1])
    try:
        ratings = read_ratings([source], format=table[0], kinds={"score": kind} if kind else {})
    except UserError as error:
        assert str(error).isprintable()
        return
    names = {head.name for head in ratings.heads}
    assert ratings.examples and names and all(line.isprintable() for line in ratings.warnings)
    for example in ratings.examples:
        assert len(example.replies) == len(example.labels) > 0
        assert {head for labels in example.labels for head in labels} <= names
        compared = set()
        for pair in example.comparisons:
            assert pair.head in names and pair.margin >= 0
            assert example.replies[pair.better] != example.replies[pair.worse]
            compared |= {pair.better, pair.worse}
        assert all(labels or place in compared for place, labels in enumerate(example.labels))
    try:
        training, out = hold_out_ratings(ratings, held)
    except UserError:
        return
    prompts = [{prompt_key(example.prompt) for example in side.examples} for side in (training, out)]
    most = max(1, len(prompts[0] | prompts[1]) // 5)
    assert not prompts[0] & prompts[1] and len(prompts[1]) == min(held, most)
    assert len(training.examples) + len(out.examples) == len(ratings.examples)
