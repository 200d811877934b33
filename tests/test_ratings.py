"""Ratings of several sources: mixtures, scales, kinds, new names; repeats; held-out prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from rating_cases import FILES, HELPSTEER, ROW, heads_of, refused, scores, written

from grpo_fast.data.rated import Comparison, HeadSpec, RatedExample, prompt_key
from grpo_fast.data.ratings import Ratings, hold_out_ratings, read_ratings
from grpo_fast.errors import UserError

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
        "them another name, as with --data.rename 'ultrafeedback.jsonl:helpfulness=helpfulness_2'"
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
    assert "--data.rename 'hundred.jsonl:score=score_2'" in refused(ten, hundred)
    renamed = written(tmp_path / "old.jsonl", *scores(0, 100, head="points"))
    assert "--data.rename 'old.jsonl:points=score_2'" in refused(ten, renamed, rename={"points": "score"})
    assert len(read_ratings([ten, three, constant]).examples) == 6  # 9.5 is less than three times 3.3
    assert "--data.rename 'less.jsonl:score=score_2'" in refused(ten, less)  # and more than three times 3.1
    steer = written(
        tmp_path / "h.jsonl",
        *({**ROW, **HELPSTEER, "response": str(x), **dict.fromkeys(HELPSTEER, x)} for x in (0, 4)),
    )
    for values, good in (
        ((0.5, 3.5), True),
        ((1, 5), False),
        ((0.0, 0.4), False),
        ((-0.5, 3), False),
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
    assert f"'{two}:score=score_2'" in refused(one, two)
    assert list(heads_of(read_ratings([one, two], rename={f"{two}:score": "score_2"}))) == [
        "score",
        "score_2",
    ]


def test_kinds_that_differ(tmp_path: Path):
    yes = written(tmp_path / "yes.jsonl", *scores(0, 1, True))
    share = written(tmp_path / "share.jsonl", *scores(0.5, 1, prompt="q"))
    ones = written(tmp_path / "ones.jsonl", *scores(1, 1, prompt="s"))
    message = refused(yes, share)
    assert f"score is binary in {yes} and regression in {share}: " in message and "--data.kinds" in message
    assert heads_of(read_ratings([yes, share], kinds={"score": "binary"}))["score"] == ("binary", 0, 1)
    assert heads_of(read_ratings([ones, share]))["score"] == ("regression", None, None)
    assert heads_of(read_ratings([ones, yes]))["score"] == ("binary", 0, 1)
    halves = written(tmp_path / "halves.jsonl", *scores(0.5, 0.5, prompt="h"))
    assert refused(yes, halves) == f"{halves}:1: score is binary, so it must be 0 or 1, got 0.5"
    pair = written(tmp_path / "pair.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert "is binary in" in refused(yes, pair, rename={"score": "preference"})
    assert "pairwise in" in refused(yes, pair, rename={"score": "preference"})


def test_the_good_end_goes_with_the_head_and_two_ends_are_refused(tmp_path: Path):
    beaver = str(FILES / "beavertails.jsonl")
    for ratings in (
        read_ratings([beaver, beaver], rename={"animal_abuse": "cruel"}),
        read_ratings([beaver, beaver], kinds={"animal_abuse": "regression"}),
    ):
        assert ratings.heads[0].better == "low" and ratings.heads[-1].better == "high"
    assert hold_out_ratings(read_ratings([beaver]), 0)[0].heads[0].better == "low"
    yes = written(tmp_path / "yes.jsonl", *scores(0, 1, head="animal_abuse"))
    ones = written(tmp_path / "ones.jsonl", *scores(1, 1, head="animal_abuse"))
    for other in (yes, ones):
        name = Path(other).name
        assert refused(beaver, other) == (
            f"animal_abuse is better low in {beaver} and better high in {other}: give one of them another "
            f"name, as with --data.rename '{name}:animal_abuse=animal_abuse_2'"
        )


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
    assert "--data.kinds: score is regression in" in refused(levels, kinds={"score": "pairwise"})
    assert "cannot be binary" in refused(str(FILES / "preference.jsonl"), kinds={"preference": "binary"})
    assert refused(levels, kinds={"score": "ordnal"}) == (
        "--data.kinds: score must be one of regression, binary, ordinal, pairwise, got 'ordnal'; did you mean ordinal?"
    )
    assert refused(levels, kinds={"scor": "ordinal"}) == (
        "--data.kinds: no source has a head 'scor', there are score; did you mean score?"
    )


def test_rename(tmp_path: Path):
    source = written(tmp_path / "r.jsonl", *({**row, "b": 2 * row["score"]} for row in scores(1, 2)))
    swapped = read_ratings([source], rename={"score": "b", "b": "score"})
    assert swapped.examples[1].labels == ({"b": 2.0, "score": 4.0},)
    assert list(heads_of(read_ratings([source], rename={"r.jsonl:b": ""}))) == ["score"]
    assert "two heads of" in refused(source, rename={"b": "score"})
    assert "must be printable" in refused(source, rename={"b": "a\nb"})
    assert refused(source, rename={"scores": "x"}) == (
        "--data.rename: no source has a head 'scores', there are score, b; did you mean score?"
    )
    assert "did you mean r.jsonl:score?" in refused(source, rename={"q.jsonl:score": "x"})
    pairs = read_ratings([str(FILES / "pku-saferlhf.jsonl")], rename={"better": "", "safer": "harmless"})
    assert [head.name for head in pairs.heads] == ["is_safe", "harmless"]
    assert {pair.head for example in pairs.examples for pair in example.comparisons} == {"harmless"}
    only_pairs = read_ratings([str(FILES / "pku-saferlhf.jsonl")], rename={"is_safe": "", "safer": ""})
    assert [head.name for head in only_pairs.heads] == ["better"] and len(only_pairs.examples) == 3


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


def test_a_column_that_is_nearly_binary(tmp_path: Path):
    rows = scores(*[0, 1] * 9, 2, 0.5)
    source = written(tmp_path / "y.jsonl", *rows)
    said = (
        f"head score is taken for a regression: 2 of 20 values are neither 0 nor 1, the first 2 at {source}:19; "
        "if it is a yes or no, --data.kinds score=binary refuses by line what is not in 0 to 1"
    )
    assert read_ratings([source]).warnings == [said]
    assert refused(source, kinds={"score": "binary"}) == (
        f"{source}:19: score is binary, so it must be 0 to 1, got 2"
    )
    assert read_ratings([source], kinds={"score": "regression"}).warnings == []
    named = read_ratings([source], rename={"score": "is it"}).warnings
    assert len(named) == 1 and "--data.kinds 'is it=binary' refuses" in named[0]
    more = written(tmp_path / "more.jsonl", *rows[1:])  # 17 of 19 are less than nine tenths
    assert read_ratings([more]).warnings == ["head score has only 19 labels"]
    one = written(tmp_path / "one.jsonl", *rows[:19])
    assert f"1 of 19 values is neither 0 nor 1, the first 2 at {one}:19" in read_ratings([one]).warnings[1]


def test_labels_far_off_the_others(tmp_path: Path):
    source = written(tmp_path / "s.jsonl", *scores(*range(1, 11), 400, *range(1, 10)))
    said = "1 label is more than 8 standard deviations of the others from their mean, the first 400 at"
    assert read_ratings([source]).warnings == [f"head score: {said} {source}:11"]
    assert len(read_ratings([source], kinds={"score": "ordinal"}).warnings) == 1
    few = written(tmp_path / "few.jsonl", *scores(*range(1, 11), 400, *range(1, 9)))
    assert read_ratings([few]).warnings == ["head score has only 19 labels"]
    twice = written(tmp_path / "twice.jsonl", *scores(*range(10), 1e30, *range(200), -1e30))
    assert (
        f"2 labels are more than 8 standard deviations of the others from their mean, the first 1e+30 at {twice}:11"
        in (read_ratings([twice]).warnings[0])
    )


@pytest.mark.parametrize("away", [7.99, -7.99, 8.01, -8.01])
def test_far_is_eight_deviations_of_the_others(tmp_path: Path, away: float):
    others = [3 + value / 10 for value in range(40)]
    value = fmean(others) + away * pstdev(others)
    source = written(tmp_path / "s.jsonl", *scores(*others, value))
    warnings = read_ratings([source]).warnings
    assert len(warnings) == (abs(away) > 8) and all(
        f"the first {value:g} at {source}:41" in w for w in warnings
    )


def test_what_a_fixed_scale_allows_is_not_far_off(tmp_path: Path):
    rows = [
        {**ROW, "response": str(index), **dict.fromkeys(HELPSTEER, 0 if index == 7 else 4 - index % 20 // 19)}
        for index in range(300)
    ]
    assert read_ratings([written(tmp_path / "h.jsonl", *rows)]).warnings == []


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ((0, 10), False),
        ((0, 8.4), True),  # its upper end is off by 16%
        ((0.8, 9.2), False),  # 10 is 1.19 times 8.4
        ((0.9, 9.1), True),  # and 1.22 times 8.2
        ((1.4, 11.4), False),
        ((1.6, 11.6), True),
        ((-1.6, 8.4), True),
        ((7, 7), False),
        ((11, 11), False),
        ((12, 12), True),
        ((-2, -2), True),
    ],
)
def test_ranges_that_may_be_two_scales(tmp_path: Path, values: tuple[float, float], warned: bool):
    ten = written(tmp_path / "ten.jsonl", *scores(0, 10))
    other = written(tmp_path / "other.jsonl", *scores(*values, prompt="q"))
    for one, two in ((ten, other), (other, ten)):
        said = [line for line in read_ratings([one, two]).warnings if "two scales" in line]
        assert len(said) == warned
    if warned:
        assert read_ratings([ten, other]).warnings[-1] == (
            f"score goes from 0 to 10 in {ten} and goes from {values[0]:g} to {values[1]:g} in {other}: if these are "
            "two scales, give one of them another name, as with --data.rename 'other.jsonl:score=score_2'"
        )
    apart = (
        read_ratings([ten, other], rename={"other.jsonl:score": "score_2"}) if values[0] < values[1] else None
    )
    assert apart is None or not any("two scales" in line for line in apart.warnings)


def test_a_column_beside_a_fixed_scale_and_equal_fixed_scales(tmp_path: Path):
    rows = [{**ROW, "response": str(x), **dict.fromkeys(HELPSTEER, x)} for x in (0, 3)]
    steer, again = (written(tmp_path / name, *rows[:size]) for name, size in (("h.jsonl", 2), ("g.jsonl", 1)))
    thirds = written(tmp_path / "thirds.jsonl", *scores(0, 3, head="helpfulness"))
    said = read_ratings([steer, again, thirds]).warnings
    assert [line.split(":")[0] for line in said if "two scales" in line] == [
        f"helpfulness is rated 0 to 4 in {source} and goes from 0 to 3 in {thirds}"
        for source in (steer, again)
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
    ratings = rated(*"abcdefghijklmnopa")
    training, held = hold_out_ratings(ratings, 3)
    assert [example.prompt for example in held.examples] == ["a", "f", "k", "a"]
    assert [example.prompt for example in training.examples] == list("bcdeghijlmnop")
    assert training.heads == held.heads == ratings.heads
    assert (training.warnings, held.warnings) == (["w"], [])
    none, nothing = hold_out_ratings(ratings, 0)
    assert none == ratings and nothing.examples == []


def test_no_more_than_a_fifth_of_the_prompts_is_held_out():
    sixty = rated(*(f"p{index}" for index in range(60)))
    training, held = hold_out_ratings(sixty, 600)
    assert [example.prompt for example in held.examples] == [f"p{index}" for index in range(0, 60, 5)]
    assert len(training.examples) == 48 and training.warnings == ["w"]
    assert held.warnings == ["data.eval_size = 600, but there are 60 prompts: 12 are held out"]
    for size, count in ((11, 11), (12, 12), (13, 12)):
        held = hold_out_ratings(sixty, size)[1]
        assert (len(held.examples), len(held.warnings)) == (count, size - count)
    few = hold_out_ratings(rated("a", "b", "c"), 2)[1]
    assert [example.prompt for example in few.examples] == ["a"]
    assert few.warnings == ["data.eval_size = 2, but there are 3 prompts: 1 is held out"]
    assert hold_out_ratings(rated("a", "b", "c"), 1)[1].warnings == []


def test_a_chat_of_one_message_is_the_same_prompt_as_its_text():
    chat = RatedExample(prompt=[{"role": "user", "content": "a"}], replies=("s",), labels=({"score": 9.0},))
    ratings = rated("a", "b", "c")
    both = Ratings(examples=[*ratings.examples, chat], heads=ratings.heads, warnings=[])
    training, held = hold_out_ratings(both, 1)
    assert [example.replies for example in held.examples] == [("r",), ("s",)] and len(training.examples) == 2
    asked = [{"role": "user", "content": "a"}]
    assert prompt_key(asked) != prompt_key([{"role": "system", "content": "s"}, *asked])


def test_too_much_is_held_out():
    two = [
        replace(example, labels=({"score": value, "b": 1.0 - value},))
        for example, value in zip(rated("a", "b").examples, (0.0, 1.0), strict=True)
    ]
    heads = [HeadSpec(name=name, kind="regression") for name in ("score", "b")]
    with pytest.raises(UserError) as caught:
        hold_out_ratings(Ratings(examples=two, heads=heads, warnings=[]), 600)
    assert str(caught.value) == (
        "--data.eval-size 600: 1 of 2 prompts is held out, and of what is left nothing can be learned of heads "
        "score (1 label, all 1), b (1 label, all 0); rate more replies, or leave them out with "
        "--data.rename 'score=' 'b='"
    )
    with pytest.raises(
        UserError, match=r"^--data.eval-size 1: 1 of 1 prompt is held out, .* score \(no labels"
    ):
        hold_out_ratings(rated("a"), 1)
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
