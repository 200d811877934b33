"""Ratings: every schema through files and `datasets`, mixtures, every fault with its place, held-out ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_fast.data.rated import Comparison, HeadSpec, RatedExample, prompt_key
from grpo_fast.data.ratings import Ratings, hold_out_ratings, read_ratings
from grpo_fast.data.schemas import SCHEMAS
from grpo_fast.errors import UserError

FILES = Path(__file__).parent / "data" / "ratings"
FORMAT_OF = {
    "columns": "columns",
    "helpsteer2": "helpsteer2",
    "ultrafeedback": "ultrafeedback",
    "beavertails": "beavertails",
    "pku-saferlhf": "pku-saferlhf",
    "preference": "preference",
    "preference-chat": "preference",
}
ROW = {"prompt": "p", "response": "r"}
HELPSTEER = {"helpfulness": 1, "correctness": 2, "coherence": 3, "complexity": 4, "verbosity": 0}
PKU = {
    "prompt": "p",
    "response_0": "a",
    "response_1": "b",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "response_0_severity_level": 0,
    "response_1_severity_level": 2,
    "better_response_id": 1,
    "safer_response_id": 0,
}
BEAVER = {**ROW, "category": {"animal_abuse": False}, "is_safe": True}
SAID = {"role": "user", "content": "p"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FILES / f"{name}.jsonl").read_text().splitlines()]


def scores(*values: Any, head: str = "score", prompt: str = "p") -> list[dict[str, Any]]:
    """A row a value, each of a reply of its own."""
    return [
        {"prompt": f"{prompt}{index}", "response": "r", head: value} for index, value in enumerate(values)
    ]


def heads_of(ratings: Ratings) -> dict[str, tuple[str, float | None, float | None]]:
    return {head.name: (head.kind, head.low, head.high) for head in ratings.heads}


def without_places(ratings: Ratings) -> list[tuple[Any, ...]]:
    return [(item.prompt, item.replies, item.labels, item.comparisons) for item in ratings.examples]


def refused(*sources: str, **options: Any) -> str:
    """The message with which the sources are refused: one line."""
    with pytest.raises(UserError) as caught:
        read_ratings(sources, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


# ---- schemas ----


def test_columns():
    ratings = read_ratings([str(FILES / "columns.jsonl")])
    assert heads_of(ratings) == {
        "politeness": ("regression", None, None),
        "meaning": ("regression", None, None),
        "polite": ("binary", 0.0, 1.0),
    }
    assert [example.labels for example in ratings.examples] == [
        ({"politeness": 0.75, "meaning": 4.0, "polite": 1.0},),
        ({"politeness": 0.05, "polite": 0.0},),
        ({"meaning": 1.0},),
        ({"politeness": 0.5, "meaning": 5.0, "polite": 1.0},),
    ]
    assert ratings.examples[2].prompt == [{"role": "user", "content": "Name a tree."}]
    assert ratings.examples[2].replies == ("",)
    assert ratings.examples[3].where == f"{FILES / 'columns.jsonl'}:4"
    assert ratings.warnings[0] == (
        f"{FILES / 'columns.jsonl'}: columns ignored, as they hold no labels: id, source"
    )
    assert sum("ignored" in line for line in ratings.warnings) == 1


def test_helpsteer2():
    ratings = read_ratings([str(FILES / "helpsteer2.jsonl")])
    assert heads_of(ratings) == dict.fromkeys(HELPSTEER, ("regression", 0.0, 4.0))
    assert ratings.examples[1].replies == ("Tea is a drink.",)
    assert ratings.examples[1].labels == (
        {"helpfulness": 0.0, "correctness": 1.0, "coherence": 3.0, "complexity": 0.0, "verbosity": 0.0},
    )


def test_ultrafeedback():
    ratings = read_ratings([str(FILES / "ultrafeedback.jsonl")])
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    assert heads_of(ratings) == dict.fromkeys(aspects, ("regression", 1.0, 5.0))
    first, second = ratings.examples
    assert first.prompt == "Write a haiku about rain." and len(first.replies) == len(second.replies) == 2
    assert first.labels[1] == {"instruction_following": 1.0, "truthfulness": 5.0, "helpfulness": 2.0}
    assert second.labels[0] == dict(zip(aspects, (5.0, 5.0, 5.0, 4.0), strict=True))


def test_ultrafeedback_forms_of_a_rating(tmp_path: Path):
    forms = [
        {"a": [{"Rating": "2"}, {"Rating": "5"}]},
        {"a": {}, "b": {"Rating": 3}},
        {"a": [], "b": None},
        None,
    ]
    completions = [{"response": f"r{index}", "annotations": form} for index, form in enumerate(forms)]
    other = {
        "instruction": "q",
        "completions": [{"response": "x", "annotations": {"a": {"Rating": 4}, "b": {"Rating": "4"}}}],
    }
    rows = [{"instruction": "p", "completions": completions}, other, {"instruction": "z", "completions": []}]
    source = written(tmp_path / "u.jsonl", *rows)
    ratings = read_ratings([source])
    assert [example.labels for example in ratings.examples] == [
        ({"a": 2.0}, {"b": 3.0}),
        ({"a": 4.0, "b": 4.0},),
    ]
    assert ratings.examples[0].replies == ("r0", "r1")
    assert f"1 row without completions left out, the first at {source}:3" in ratings.warnings
    assert f"2 replies without any label left out, the first at {source}:1" in ratings.warnings


def test_beavertails():
    ratings = read_ratings([str(FILES / "beavertails.jsonl")])
    names = list(rows_of("beavertails")[0]["category"])
    assert [head.name for head in ratings.heads] == [*names, "is_safe"] and len(names) == 14
    assert "controversial_topics,politics" in names
    assert {(head.kind, head.low, head.high) for head in ratings.heads} == {("binary", 0.0, 1.0)}
    assert (
        ratings.examples[1].labels[0]["animal_abuse"] == 1 and ratings.examples[1].labels[0]["is_safe"] == 0
    )


def test_pku_saferlhf():
    source = str(FILES / "pku-saferlhf.jsonl")
    ratings = read_ratings([source])
    assert heads_of(ratings) == {
        "is_safe": ("binary", 0.0, 1.0),
        "better": ("pairwise", None, None),
        "safer": ("pairwise", None, None),
    }
    assert [example.labels for example in ratings.examples] == [
        ({"is_safe": 1.0}, {"is_safe": 0.0}),
        ({"is_safe": 1.0}, {"is_safe": 1.0}),
        ({"is_safe": 0.0}, {"is_safe": 0.0}),
    ]
    assert [example.comparisons for example in ratings.examples] == [
        (
            Comparison(head="better", better=0, worse=1),
            Comparison(head="safer", better=0, worse=1, margin=2.0),
        ),
        (Comparison(head="better", better=1, worse=0), Comparison(head="safer", better=1, worse=0)),
        (
            Comparison(head="better", better=1, worse=0),
            Comparison(head="safer", better=0, worse=1, margin=2.0),
        ),
    ]


def test_pku_saferlhf_without_severity_or_with_one_that_contradicts(tmp_path: Path):
    none = {name: value for name, value in PKU.items() if "severity" not in name}
    against = PKU | {"prompt": "q", "safer_response_id": 1}
    unsaid = PKU | {"prompt": "s", "better_response_id": None, "safer_response_id": 0}
    same = PKU | {"prompt": "t", "response_1": "a", "is_response_1_safe": True}
    source = written(tmp_path / "p.jsonl", none, against, unsaid, same)
    ratings = read_ratings([source])
    assert [[pair.margin for pair in example.comparisons] for example in ratings.examples] == [
        [0, 0],
        [0, 0],
        [2],
        [],
    ]
    assert ratings.examples[1].comparisons[1].better == 1
    assert (
        f"1 pair whose severity contradicts safer_response_id, margin 0, the first at {source}:2"
        in ratings.warnings
    )
    assert f"2 pairs of equal replies skipped, the first at {source}:4" in ratings.warnings
    assert ratings.examples[3].labels == ({"is_safe": 1.0},)  # the second of two equal ratings is dropped


def test_preference():
    ratings = read_ratings([str(FILES / "preference.jsonl"), str(FILES / "preference-chat.jsonl")])
    assert heads_of(ratings) == {"preference": ("pairwise", None, None)}
    assert [example.comparisons[0].margin for example in ratings.examples] == [0.0, 1.5, 5.5, 0.0]
    assert ratings.examples[0].prompt == "Is the sky blue?"
    assert ratings.examples[2].prompt == [{"role": "user", "content": "Is the sky blue?"}]
    assert [turn["role"] for turn in ratings.examples[3].prompt] == ["user", "assistant", "user"]  # type: ignore
    assert ratings.examples[3].replies == ("The oak.", "")
    assert ratings.warnings == ["head preference has only 4 pairs"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SAID], "chosen": [answer("a")], "rejected": [answer("b")]},
        {"prompt": [SAID], "chosen": [SAID, answer("a")], "rejected": [SAID, answer("b")]},
        {"chosen": [SAID, answer("a")], "rejected": [SAID, answer("b")]},
        {"prompt": None, "chosen": [SAID, answer("a")], "rejected": [SAID, answer("b")]},
    ],
)
def test_chats_of_a_preference(tmp_path: Path, row: dict[str, Any]):
    example = read_ratings([written(tmp_path / "p.jsonl", row)]).examples[0]
    assert example.prompt == [SAID] and example.replies == ("a", "b")


def test_preference_skips_equal_replies_and_mistrusts_a_negative_margin(tmp_path: Path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1},
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "3", "score_rejected": 1},
    ]
    source = written(tmp_path / "p.jsonl", *rows)
    ratings = read_ratings([source])
    assert [example.comparisons[0].margin for example in ratings.examples] == [0.0, 2.0]
    assert ratings.warnings[:2] == [
        f"1 pair of equal replies skipped, the first at {source}:1",
        f"1 pair whose margin contradicts the choice, margin 0, the first at {source}:2",
    ]


@pytest.mark.parametrize("name", FORMAT_OF)
def test_every_file_reads_the_same_saved_by_datasets_and_by_name(tmp_path: Path, name: str):
    import datasets

    plain = read_ratings([str(FILES / f"{name}.jsonl")])
    assert without_places(plain) == without_places(
        read_ratings([str(FILES / f"{name}.jsonl")], format=FORMAT_OF[name])
    )
    rows = rows_of(name)
    if name == "columns":  # a column of a table has one type
        rows = [
            {**row, "prompt": "Name a tree.", "politeness": None} if row["id"] == "a3" else row
            for row in rows
        ]
        plain = read_ratings([written(tmp_path / "same.jsonl", *rows)])
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "splits"))
    table.to_parquet(str(tmp_path / "table.parquet"))
    for source in ("saved", "splits", "table.parquet"):
        ratings = read_ratings([str(tmp_path / source)])
        assert without_places(ratings) == without_places(plain), source
        assert ratings.heads == plain.heads, source
    with pytest.raises(
        UserError, match=r"cannot load data set .*splits, split tset: the splits are train, test$"
    ):
        read_ratings([str(tmp_path / "splits")], split="tset")


def test_columns_of_csv(tmp_path: Path):
    import pandas

    rows = [row for row in rows_of("columns") if row["id"] != "a3"]
    pandas.DataFrame(rows).to_csv(tmp_path / "c.csv")  # with the nameless index in front
    ratings = read_ratings([str(tmp_path / "c.csv")])
    assert without_places(ratings) == without_places(read_ratings([written(tmp_path / "c.jsonl", *rows)]))
    assert heads_of(ratings)["polite"][0] == "binary"
    assert ratings.warnings[0].endswith("columns ignored, as they hold no labels: '', id, source")
    (tmp_path / "h.csv").write_text(f"prompt,response,{','.join(HELPSTEER)}\np,r,1,2,3,4,0\np,s,2,1,4,3,1\n")
    assert read_ratings([str(tmp_path / "h.csv")]).examples[0].labels == (HELPSTEER,)
    (tmp_path / "i.csv").write_text("prompt,response,code,score\np,r,1_2,3\nq,r,1_3,4\n")
    assert [head.name for head in read_ratings([str(tmp_path / "i.csv")]).heads] == ["score"]


@pytest.mark.parametrize("reply", ["response", "completion", "reply", "answer"])
def test_names_of_the_reply(tmp_path: Path, reply: str):
    rows = [{"prompt": "p", reply: text, "score": score} for text, score in (("a", 1.5), ("b", 2))]
    ratings = read_ratings([written(tmp_path / "c.jsonl", *rows)])
    assert [example.replies for example in ratings.examples] == [("a",), ("b",)]
    chat = [{"messages": [SAID, answer(row[reply])], "score": row["score"]} for row in rows]
    told = read_ratings([written(tmp_path / "m.jsonl", *chat)])
    assert [(item.prompt, item.replies) for item in told.examples] == [([SAID], ("a",)), ([SAID], ("b",))]
    both = [{"messages": [SAID], reply: [answer(row[reply])], "score": row["score"]} for row in rows]
    assert without_places(read_ratings([written(tmp_path / "b.jsonl", *both)])) == without_places(told)


def test_the_first_reply_column_is_taken_and_the_others_are_named(tmp_path: Path):
    rows = [{"prompt": "p", "answer": "gold", "response": text, "s": len(text)} for text in ("a", "bb")]
    ratings = read_ratings([written(tmp_path / "c.jsonl", *rows)])
    assert ratings.examples[1].replies == ("bb",) and "no labels: answer" in ratings.warnings[0]


def test_a_stray_number_in_a_column_of_texts_is_a_text(tmp_path: Path):
    rows = [{**ROW, "prompt": str(index), "id": key, "s": index} for index, key in enumerate(["a", "b", 7])]
    assert [head.name for head in read_ratings([written(tmp_path / "c.jsonl", *rows)]).heads] == ["s"]


def test_added_columns_of_a_public_schema_are_named(tmp_path: Path):
    rows = [{**row, "politeness": 3} for row in rows_of("helpsteer2")]
    source = written(tmp_path / "h.jsonl", *rows)
    assert read_ratings([source]).warnings[0] == (
        f"{source}: columns ignored, as helpsteer2 has no such heads: politeness"
    )
    rows[0]["politeness"] = 2
    assert "politeness" in heads_of(read_ratings([written(tmp_path / "h.jsonl", *rows)], format="columns"))


# ---- several sources ----


def test_a_mixture_unites_the_heads():
    names = ("helpsteer2", "beavertails", "pku-saferlhf", "preference")
    parts = [read_ratings([str(FILES / f"{name}.jsonl")]) for name in names]
    ratings = read_ratings([str(FILES / f"{name}.jsonl") for name in names])
    assert ratings.examples == [example for part in parts for example in part.examples]
    wanted = dict.fromkeys(head for part in parts for head in part.heads)
    assert ratings.heads == list(wanted)
    assert [head.name for head in ratings.heads].count("is_safe") == 1
    assert "head is_safe has only 10 labels" in ratings.warnings


def test_scales_that_differ_are_refused_and_rename_is_the_way_out():
    helpsteer, ultra = str(FILES / "helpsteer2.jsonl"), str(FILES / "ultrafeedback.jsonl")
    message = refused(helpsteer, ultra)
    assert message == (
        f"helpfulness is rated 0 to 4 in {helpsteer} and is rated 1 to 5 in {ultra}, another scale: give one of "
        'them another name with rename, as in "ultrafeedback.jsonl:helpfulness=helpfulness_2"'
    )
    ratings = read_ratings([helpsteer, ultra], rename={"ultrafeedback.jsonl:helpfulness": "help_5"})
    assert heads_of(ratings)["helpfulness"][1:] == (0, 4) and heads_of(ratings)["help_5"][1:] == (1, 5)
    assert ratings.examples[-1].labels[0]["help_5"] == 4.0
    for key in (f"{ultra}:helpfulness", "helpfulness"):
        with_key = {key: "other", "ultrafeedback.jsonl:helpfulness": "help_5"}
        names = heads_of(read_ratings([helpsteer, ultra], rename=with_key))
        assert {"other", "help_5"} & names.keys() == ({"other"} if ultra in key else {"other", "help_5"})


def test_ranges_of_columns_that_cannot_be_one_scale(tmp_path: Path):
    ten = written(tmp_path / "ten.jsonl", *scores(0.5, 10))
    three = written(tmp_path / "three.jsonl", *scores(0.5, 3.8, prompt="t"))
    less = written(tmp_path / "less.jsonl", *scores(0.5, 3.6, prompt="t"))
    hundred = written(tmp_path / "hundred.jsonl", *scores(0, 100, prompt="q"))
    constant = written(tmp_path / "constant.jsonl", *scores(2, 2, prompt="z"))
    assert f"score goes from 0.5 to 10 in {ten} and goes from 0 to 100 in {hundred}" in refused(ten, hundred)
    assert '"hundred.jsonl:score=score_2"' in refused(ten, hundred)
    assert len(read_ratings([ten, three, constant]).examples) == 6  # 9.5 is less than three times 3.3
    assert '"less.jsonl:score=score_2"' in refused(ten, less)  # and more than three times 3.1
    steer = written(
        tmp_path / "h.jsonl",
        *({**ROW, **HELPSTEER, "response": str(x), **dict.fromkeys(HELPSTEER, x)} for x in (0, 4)),
    )
    for values, good in (
        ((0.5, 3.5), True),
        ((1, 5), False),
        ((0.0, 0.4), False),
        ((4, 4), True),
        ((7, 7), False),
    ):
        other = written(tmp_path / "o.jsonl", *scores(*values, head="helpfulness"))
        if good:
            assert heads_of(read_ratings([steer, other]))["helpfulness"] == ("regression", 0.0, 4.0)
        else:
            assert "helpfulness is rated 0 to 4 in" in refused(steer, other)
            assert "helpfulness goes from" in refused(other, steer)


def test_two_sources_of_one_file_name(tmp_path: Path):
    for folder, values in (("a", (0.5, 1)), ("b", (0, 50))):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder / "t.jsonl", *scores(*values, prompt=folder))
    one, two = str(tmp_path / "a" / "t.jsonl"), str(tmp_path / "b" / "t.jsonl")
    assert f'"{two}:score=score_2"' in refused(one, two)
    assert list(heads_of(read_ratings([one, two], rename={f"{two}:score": "score_2"}))) == [
        "score",
        "score_2",
    ]


def test_kinds_that_differ(tmp_path: Path):
    yes = written(tmp_path / "yes.jsonl", *scores(0, 1, True))
    share = written(tmp_path / "share.jsonl", *scores(0.5, 1, prompt="q"))
    ones = written(tmp_path / "ones.jsonl", *scores(1, 1, prompt="s"))
    message = refused(yes, share)
    assert f"score is binary in {yes} and regression in {share}: " in message and "kinds" in message
    assert heads_of(read_ratings([yes, share], kinds={"score": "binary"}))["score"] == ("binary", 0, 1)
    assert heads_of(read_ratings([ones, share]))["score"] == ("regression", None, None)
    assert heads_of(read_ratings([ones, yes]))["score"] == ("binary", 0, 1)
    halves = written(tmp_path / "halves.jsonl", *scores(0.5, 0.5, prompt="h"))
    assert refused(yes, halves) == f"{halves}:1: score is binary, so it must be 0 or 1, got 0.5"
    pair = written(tmp_path / "pair.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert "is binary in" in refused(yes, pair, rename={"score": "preference"})
    assert "pairwise in" in refused(yes, pair, rename={"score": "preference"})


def test_kinds_are_what_the_user_says(tmp_path: Path):
    levels = written(tmp_path / "levels.jsonl", *scores(1, 2, 3))
    assert heads_of(read_ratings([levels]))["score"][0] == "regression"
    assert heads_of(read_ratings([levels], kinds={"score": "ordinal"}))["score"] == ("ordinal", None, None)
    yes = written(tmp_path / "yes.jsonl", *scores(0, 1))
    assert heads_of(read_ratings([yes], kinds={"score": "regression"}))["score"] == ("regression", None, None)
    steer = str(FILES / "helpsteer2.jsonl")
    assert heads_of(read_ratings([steer], kinds={"coherence": "ordinal"}))["coherence"] == ("ordinal", 0, 4)
    assert refused(levels, kinds={"score": "binary"}) == (
        f"{levels}:2: score is binary, so it must be 0 to 1, got 2"
    )
    half = written(tmp_path / "half.jsonl", *scores(1, 2.5, 3))
    assert refused(half, kinds={"score": "ordinal"}) == (
        f"{half}:2: score is ordinal, so it must be a whole number, got 2.5"
    )
    assert "kinds: score is regression in" in refused(levels, kinds={"score": "pairwise"})
    assert "cannot be binary" in refused(str(FILES / "preference.jsonl"), kinds={"preference": "binary"})
    assert refused(levels, kinds={"score": "ordnal"}) == (
        "kinds: score must be one of regression, binary, ordinal, pairwise, got 'ordnal'; did you mean ordinal?"
    )
    assert refused(levels, kinds={"scor": "ordinal"}) == (
        "kinds: no source has a head 'scor', there are score; did you mean score?"
    )


def test_rename(tmp_path: Path):
    source = written(tmp_path / "r.jsonl", *({**row, "b": 2 * row["score"]} for row in scores(1, 2)))
    swapped = read_ratings([source], rename={"score": "b", "b": "score"})
    assert swapped.examples[1].labels == ({"b": 2.0, "score": 4.0},)
    assert list(heads_of(read_ratings([source], rename={"r.jsonl:b": ""}))) == ["score"]
    assert "two heads of" in refused(source, rename={"b": "score"})
    assert "must be printable" in refused(source, rename={"b": "a\nb"})
    assert refused(source, rename={"scores": "x"}) == (
        "rename: no source has a head 'scores', there are score, b; did you mean score?"
    )
    assert "did you mean r.jsonl:score?" in refused(source, rename={"q.jsonl:score": "x"})
    pairs = read_ratings([str(FILES / "pku-saferlhf.jsonl")], rename={"better": "", "safer": "harmless"})
    assert [head.name for head in pairs.heads] == ["is_safe", "harmless"]
    assert {pair.head for example in pairs.examples for pair in example.comparisons} == {"harmless"}
    only_pairs = read_ratings([str(FILES / "pku-saferlhf.jsonl")], rename={"is_safe": "", "safer": ""})
    assert [head.name for head in only_pairs.heads] == ["better"] and len(only_pairs.examples) == 3


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
        ({"text": "a", "score": 1}, "no format fits the columns text, score: give format, one of columns, "),
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
        "nothing can be learned of head score: 3 labels, all 3; rate more replies, or leave it out with "
        'rename "score="'
    )
    assert len(read_ratings([same, other]).examples) == 4
    both = written(tmp_path / "both.jsonl", *({**row, "b": index} for index, row in enumerate(scores(3, 3))))
    assert list(heads_of(read_ratings([both], rename={"score": ""}))) == ["b"]


# ---- warnings ----


def test_repeated_and_contradictory_ratings(tmp_path: Path):
    rows = scores(1, 2)
    again = {**rows[0], "prompt": [{"role": "user", "content": "p0"}]}
    more = [rows[0], again, {**rows[1], "score": 3}, {**rows[1], "score": None}]
    one = written(tmp_path / "one.jsonl", *rows, *more)
    two = written(tmp_path / "two.jsonl", {**rows[0], "other": 0.5}, {**rows[0], "other": 2, "score": None})
    ratings = read_ratings([one, two])
    assert [example.labels for example in ratings.examples] == [
        ({"score": 1.0},),
        ({"score": 2.0},),
        ({"score": 3.0},),
        ({"score": 1.0, "other": 0.5},),
        ({"other": 2.0},),
    ]
    assert ratings.warnings == [
        f"2 repeated ratings dropped, the first at {one}:3",
        f"2 ratings kept that contradicted an earlier one, the first at {one}:5",
        f"1 reply without any label left out, the first at {one}:6",
        "head score has only 4 labels",
        "head other has only 2 labels",
    ]


def test_repeated_and_contradictory_pairs(tmp_path: Path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
        {"prompt": "q", "chosen": "b", "rejected": "a"},
    ]
    source = written(tmp_path / "p.jsonl", *rows)
    ratings = read_ratings([source])
    assert [example.where for example in ratings.examples] == [f"{source}:{line}" for line in (1, 3, 4)]
    assert ratings.warnings == [
        f"1 repeated pair dropped, the first at {source}:2",
        f"1 pair kept that contradicted an earlier one, the first at {source}:3",
        "head preference has only 3 pairs",
    ]


def test_enough_labels_give_no_warning(tmp_path: Path):
    assert read_ratings([written(tmp_path / "a.jsonl", *scores(*range(20)))]).warnings == []
    assert read_ratings([written(tmp_path / "a.jsonl", *scores(*range(19)))]).warnings == [
        "head score has only 19 labels"
    ]


def test_a_head_of_a_schema_without_labels_is_left_out(tmp_path: Path):
    rows = [
        {**ROW, "response": str(score), **dict.fromkeys(HELPSTEER, score), "verbosity": "NaN"}
        for score in (1, 2)
    ]
    ratings = read_ratings([written(tmp_path / "h.jsonl", *rows)])
    assert [head.name for head in ratings.heads] == list(HELPSTEER)[:4]
    assert "head verbosity left out: it has no labels" in ratings.warnings


# ---- held-out ratings ----


def rated(*prompts: str, head: str = "score") -> Ratings:
    examples = [
        RatedExample(prompt=prompt, replies=("r",), labels=({head: float(index)},))
        for index, prompt in enumerate(prompts)
    ]
    return Ratings(examples=examples, heads=[HeadSpec(name=head, kind="regression")], warnings=["w"])


def test_held_out_prompts_leave_training():
    ratings = rated("a", "b", "a", "c", "d", "b", "e", "f")
    training, held = hold_out_ratings(ratings, 3)
    assert [example.prompt for example in held.examples] == ["a", "a", "c", "e"]
    assert [example.prompt for example in training.examples] == ["b", "d", "b", "f"]
    assert training.heads == held.heads == ratings.heads
    assert (training.warnings, held.warnings) == (["w"], [])
    none, nothing = hold_out_ratings(ratings, 0)
    assert none == ratings and nothing.examples == []


def test_a_chat_of_one_message_is_the_same_prompt_as_its_text():
    chat = RatedExample(prompt=[{"role": "user", "content": "a"}], replies=("s",), labels=({"score": 9.0},))
    ratings = rated("a", "b", "c")
    both = Ratings(examples=[*ratings.examples, chat], heads=ratings.heads, warnings=[])
    training, held = hold_out_ratings(both, 1)
    assert [example.replies for example in held.examples] == [("r",), ("s",)] and len(training.examples) == 2
    asked = [{"role": "user", "content": "a"}]
    assert prompt_key(asked) != prompt_key([{"role": "system", "content": "s"}, *asked])


def test_too_much_is_held_out():
    with pytest.raises(UserError, match=r"^3 held-out of 3 prompts are too many: head score has no labels$"):
        hold_out_ratings(rated("a", "b", "c"), 3)
    with pytest.raises(
        UserError, match=r"^2 held-out of 3 prompts are too many: nothing can be learned of head"
    ):
        hold_out_ratings(rated("a", "b", "c"), 2)
    rare = RatedExample(
        prompt="z",
        replies=("a", "b"),
        labels=({}, {}),
        comparisons=(Comparison(head="p", better=0, worse=1),),
    )
    ratings = rated("a", "b", "c")
    mixed = Ratings(
        examples=[*ratings.examples, rare],
        heads=[*ratings.heads, HeadSpec(name="p", kind="pairwise")],
        warnings=[],
    )
    assert hold_out_ratings(mixed, 1)[1].warnings == ["head p has no held-out labels"]


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
    assert not prompts[0] & prompts[1] and len(prompts[1]) == held
    assert len(training.examples) + len(out.examples) == len(ratings.examples)
