"""Ratings: every schema through files and through `datasets`, and the forms that each allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rating_cases import (
    FILES,
    FORMAT_OF,
    HELPSTEER,
    PKU,
    ROW,
    SAID,
    answer,
    heads_of,
    rows_of,
    scores,
    without_places,
    written,
)

from grpo_fast.data.rated import Comparison, HeadSpec, RatedExample
from grpo_fast.data.ratings import read_ratings
from grpo_fast.data.schemas import SCHEMAS, Schema, Table
from grpo_fast.errors import UserError


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
    assert read_ratings(str(FILES / "columns.jsonl")) == ratings


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
    assert [head.better for head in ratings.heads] == ["low"] * 14 + ["high"]
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


def test_digits_in_quotes_are_a_text_where_the_file_has_types(tmp_path: Path):
    rows = [{**row, "id": str(index)} for index, row in enumerate(scores(1, "2", 3))]
    ratings = read_ratings([written(tmp_path / "c.jsonl", *rows)])
    assert [head.name for head in ratings.heads] == ["score"] and "no labels: id" in ratings.warnings[0]
    assert ratings.examples[1].labels == ({"score": 2.0},)  # among numbers it is one


def test_a_new_schema_is_a_row_and_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read(table: Table) -> Iterator[RatedExample]:
        table.heads["rank"] = HeadSpec(name="rank", kind="pairwise")
        for where, columns in table.records:
            pair = Comparison(head="rank", better=2, worse=1, margin=1.0)
            yield RatedExample(
                prompt="p",
                replies=tuple(columns["ranked"]),
                labels=({},) * 3,
                comparisons=(pair,),
                where=where,
            )

    monkeypatch.setitem(SCHEMAS, "ranked", Schema(read=read, needed=("ranked",)))
    ratings = read_ratings([written(tmp_path / "r.jsonl", {"ranked": ["not compared", "bad", "good"]})])
    (example,) = ratings.examples
    assert example.replies == ("bad", "good")
    assert example.comparisons == (Comparison(head="rank", better=1, worse=0, margin=1.0),)


def test_added_columns_of_a_public_schema_are_named(tmp_path: Path):
    rows = [{**row, "politeness": 3} for row in rows_of("helpsteer2")]
    source = written(tmp_path / "h.jsonl", *rows)
    assert read_ratings([source]).warnings[0] == (
        f"{source}: columns ignored, as helpsteer2 has no such heads: politeness"
    )
    rows[0]["politeness"] = 2
    assert "politeness" in heads_of(read_ratings([written(tmp_path / "h.jsonl", *rows)], format="columns"))
