"""Prompts: every format, every fault with its place, tokenization, held-out rows, the sampler."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_fast.data.prompts import Row, hold_out, read_rows, spaced, tokenize
from grpo_fast.errors import UserError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    inner.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE)


def written(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_every_format_gives_the_same_rows(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    records = [
        {"prompt": "What is tea?", "kind": "plain"},
        {"prompt": 'A "quoted",\nlong one — ü', "kind": "x"},
    ]
    jsonl = written(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, records)) + "\n\n")
    plain = written(tmp_path / "a.json", json.dumps(records, indent=1))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, ["prompt", "kind"])
        table.writeheader()
        table.writerows(records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for source in (jsonl, plain, str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")):
        rows = read_rows(source)
        assert [row.prompt for row in rows] == [record["prompt"] for record in records], source
        assert [row.columns for row in rows] == [{"kind": "plain"}, {"kind": "x"}], source
    assert read_rows(jsonl)[1].where == f"{jsonl}:3"
    assert read_rows(str(tmp_path / "a.parquet"))[1].where.endswith("a.parquet, row 2")


def test_a_data_set_saved_by_datasets_is_read(tmp_path: Path):
    import datasets

    table = datasets.Dataset.from_list([{"question": "why?", "answer": 1}])
    table.save_to_disk(str(tmp_path / "saved"))
    rows = read_rows(str(tmp_path / "saved"), prompt_column="question")
    assert (rows[0].prompt, rows[0].columns) == ("why?", {"answer": 1})
    table.to_json(str(tmp_path / "folder" / "train.jsonl"))
    assert read_rows(str(tmp_path / "folder"), prompt_column="question")[0].prompt == "why?"
    with pytest.raises(UserError, match=r"cannot load data set .*folder, split trian: .*trian"):
        read_rows(str(tmp_path / "folder"), prompt_column="question", split="trian")


def test_chat_messages(tmp_path: Path):
    chat = [{"role": "system", "content": ""}, *CHAT, {"role": "assistant", "content": "gold"}]
    source = written(tmp_path / "a.jsonl", json.dumps({"messages": chat, "id": 7}))
    row = read_rows(source)[0]
    assert row.prompt == chat[:2] and row.plain == "hello" and row.columns == {"id": 7}
    both = written(tmp_path / "b.jsonl", json.dumps({"messages": chat, "prompt": "plain"}))
    assert read_rows(both)[0].prompt == "plain"
    assert read_rows(both, prompt_column="messages")[0].prompt == chat[:2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n', ":2: broken JSON: Expecting ',' delimiter (column 15"),
        ('{"prompt": "a"}\n\n[1]\n', ":3: must be an object with named columns, got [1]"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', ":2: not UTF-8 text (byte 0xff)"),
        (
            '{"promt": "a", "b": 1}',
            ":1: no column 'prompt' (data.prompt_column), there are promt, b; did you mean promt?",
        ),
        ("{}", ":1: no column 'prompt' (data.prompt_column), there are none"),
        ('{"prompt": 5}', ":1: prompt must be a text or a list of chat messages, got 5"),
        ('{"prompt": null}', ":1: prompt must be a text or a list of chat messages, got null"),
        ('{"prompt": []}', ":1: prompt must be a text or a list of chat messages, got []"),
        ('{"prompt": "a"}\n{"prompt": " \\n"}', ":2: prompt is empty"),
        ('{"prompt": "a\\ud800"}', ":1: prompt has half of a surrogate pair, character 2"),
        ('{"prompt": ["a"]}', ":1: prompt[0] must be a message with role and content"),
        ('{"prompt": [{"role": "user", "content": 1}]}', ":1: role and content of prompt[0] must be texts"),
        ('{"prompt": [{"role": "user", "content": ""}]}', ":1: prompt[0].content is empty"),
        ('{"prompt": [{"role": "assistant", "content": "a"}]}', ":1: prompt has no user's message to answer"),
        ("[" * 100_000, ":1: broken JSON: nested too deeply"),
        ('{"prompt": ' + "1" * 5000 + "}", ":1: broken JSON: nested too deeply or a number too long"),
        ("", " has no rows"),
        ("\n  \n", " has no rows"),
    ],
)
def test_a_fault_in_jsonl_is_one_line_with_its_place(tmp_path: Path, text: str | bytes, message: str):
    source = written(tmp_path / "prompts.jsonl", text)
    with pytest.raises(UserError) as caught:
        read_rows(source)
    assert f"{source}{message}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"prompt": "a"},\n {"prompt" "b"}]', "a.json:2: broken JSON: Expecting ':'"),
        ("a.json", '{"prompt": "a"}', "must hold a list of objects"),
        ("a.json", '[{"prompt": "a"}, 3]', "a.json, row 2: must be an object"),
        ("a.csv", "prompt,b\nx,1\ny\n", "a.csv:3: the number of fields differs from the header's 2"),
        ("a.csv", "prompt,b\nx,1,2\n", "a.csv:2: the number of fields differs"),
        ("a.csv", 'prompt\n"open\n', "a.csv:2: broken CSV"),
        ("a.csv", b"prompt\nx\n\xe9\n", "a.csv:3: not UTF-8 text"),
        ("a.csv", "", "has no rows"),
        ("a.parquet", "PAR1 no", "is no readable Parquet file"),
        ("a.txt", "x", "must end in .jsonl, .json, .csv, .parquet"),
    ],
)
def test_a_fault_in_another_format(tmp_path: Path, name: str, text: str | bytes, message: str):
    with pytest.raises(UserError) as caught:
        read_rows(written(tmp_path / name, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    for source in (str(tmp_path / "no.jsonl"), "no.jsonl", "./data/none"):
        with pytest.raises(UserError, match=r"prompts file .* does not exist"):
            read_rows(source)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=60) | st.text(alphabet='{}[]":,\n promtesgucl0e-.\\', max_size=60).map(str.encode)
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_any_bytes_give_rows_or_a_user_error(tmp_path: Path, suffix: str, data: bytes):
    try:
        rows = read_rows(written(tmp_path / f"fuzz.{suffix}", data))
    except UserError as error:
        assert str(error).isprintable() or "\n" not in str(error)
    else:
        assert rows and all(row.plain.strip() for row in rows)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 900),
)
def test_a_damaged_parquet_file_gives_rows_or_a_user_error(
    tmp_path: Path, damage: list[tuple[int, int]], cut: int
):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "fuzz.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"]}), path)
    data = bytearray(path.read_bytes())
    for place, byte in damage:
        data[place % len(data)] = byte
    try:
        read_rows(written(path, bytes(data[: max(len(data) - cut, 0)] if cut % 3 else data)))
    except UserError as error:
        assert "\n" not in str(error)


def test_tokenize_plain_and_chat(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    source = written(tmp_path / "a.jsonl", '{"prompt": "hi", "k": 1}\n' + json.dumps({"messages": CHAT}))
    plain, chat = tokenize(read_rows(source), tokenizer)
    assert (plain.text, plain.messages, plain.columns) == ("hi", None, {"k": 1})
    assert chat.text == "<user>hello<assistant>" and chat.messages == CHAT
    assert [tokenizer.decode(prompt.token_ids) for prompt in (plain, chat)] == [plain.text, chat.text]
    with_system = tokenize(read_rows(source), tokenizer, system_prompt="be kind")
    assert [prompt.text for prompt in with_system] == [
        "<system>be kind<user>hi<assistant>",
        "<system>be kind<user>hello<assistant>",
    ]
    own = Row([{"role": "system", "content": "own"}, *CHAT], {}, "x")
    assert tokenize([own], tokenizer, system_prompt="other")[0].text == "<system>own<user>hello<assistant>"


def test_special_tokens_are_not_doubled(tokenizer: PreTrainedTokenizerFast):
    from tokenizers.processors import TemplateProcessing

    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template="<s>" + TEMPLATE
    )
    other.add_special_tokens({"bos_token": "<s>"})
    bos = other.get_vocab()["<s>"]
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )  # pyright: ignore
    for row in (Row("hi", {}, "x"), Row(CHAT, {}, "x")):
        assert tokenize([row], other)[0].token_ids.count(bos) == 1


def test_what_tokenize_refuses(tokenizer: PreTrainedTokenizerFast):
    rows = [Row("short", {}, "p.jsonl:1"), Row("x" * 30, {}, "p.jsonl:2")]
    assert len(tokenize(rows, tokenizer, max_prompt_tokens=30)) == 2
    with pytest.raises(
        UserError, match=r"^p.jsonl:2: the prompt has 30 tokens, more than data.max_prompt_tokens = 29$"
    ):
        tokenize(rows, tokenizer, max_prompt_tokens=29)
    with pytest.raises(UserError, match=r"^x:3: the chat template refuses the messages: no tools$"):
        tokenize([Row([{"role": "tool", "content": "a"}], {}, "x:3")], tokenizer)
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(UserError, match="x:4: the prompt has no tokens"):
        tokenize([Row("unknown", {}, "x:4")], empty)
    with pytest.raises(UserError, match="need a chat template"):
        tokenize([Row(CHAT, {}, "x:5")], empty)


def test_held_out_rows_leave_training():
    rows = [Row(f"p{index % 8}", {}, f"f:{index}") for index in range(10)]  # p0 and p1 are there twice
    training, held = hold_out(rows, 2)
    assert [row.where for row in held] == ["f:0", "f:5"]
    assert len(training) == 7 and not {row.plain for row in training} & {row.plain for row in held}
    assert spaced(rows, 99) == rows
    with pytest.raises(UserError, match=r"data.eval_size = 10 held-out prompts leave none of the 10"):
        hold_out(rows, 10)
