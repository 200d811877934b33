"""The reward model: scores against transformers' own, what is saved and loaded, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import END, HYBRIDS, SIZES, byte_tokenizer, causal_model, config_of, reward_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    MambaConfig,
    T5Config,
)

from grpo_fast.errors import UserError
from grpo_fast.models import pretrained
from grpo_fast.models.lora import LoraSettings
from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_model import RewardModel, SavedRewardModel, _middle_layer
from grpo_fast.models.reward_text import Encoded
from grpo_fast.trust.distance import FeatureStatistics

NAN = float("nan")
HEADS = [
    Head(name="safety", mean=0.5, std=0.25),
    Head(name="tone", mean=2.0, std=1.5, low=0.0, high=4.0),
    Head(name="harmless", kind="binary", mean=0.7, std=0.46),
    Head(name="depth", kind="ordinal", mean=2.0, low=1.0, high=3.0, cuts=(-0.3, 0.9)),
    Head(name="liked", kind="pairwise"),
]
PROMPTS = ["How do I wash a cup?", "hi", "How do I wash a cup?", "Tell me a story, please.", "hi"]
REPLIES = ["First, get water.", "hello there", "", "Once upon a time there was a very small fox.", "no"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def score_weight(model: RewardModel) -> Tensor:
    return model.model.get_parameter("score.weight")


@torch.no_grad()
def raw_outputs(model: RewardModel, encoded: Encoded, token_budget: int = 4096) -> Tensor:
    """(S, O) before they get their units."""
    outputs = torch.full((len(encoded.completion_ids), len(model.layout.names)), NAN)
    for batch in model.pack(encoded, token_budget):
        outputs[batch.sequence_index] = model(batch)
    return outputs


def scores_of(model: RewardModel, prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
    """Scores of token ids, each reply with its own prompt."""
    return model.predict(
        Encoded(prompt_ids=prompts, completion_ids=replies, prompt_of=list(range(len(replies))))
    ).scores


def whole_rows(encoded: Encoded) -> list[list[int]]:
    return [
        encoded.prompt_ids[p] + ids for ids, p in zip(encoded.completion_ids, encoded.prompt_of, strict=True)
    ]


@torch.no_grad()
def of_transformers(folder: Path, rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """What the saved checkpoint gives in plain `transformers`: row by row, and right-padded together."""
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    alone = torch.cat([theirs(input_ids=torch.tensor([row])).logits for row in rows])
    width = max(map(len, rows))
    padded = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
    mask = torch.tensor([[k < len(row) for k in range(width)] for row in rows]).long()
    return alone, theirs(input_ids=padded, attention_mask=mask).logits


# Scores


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "gemma2"])
def test_packed_scores_equal_one_at_a_time_in_any_order(family: str):
    model = reward_model(HEADS, family)
    alone = torch.cat([model.scores([p], [c]) for p, c in zip(PROMPTS, REPLIES, strict=True)])
    assert alone.shape == (5, 5) and alone.dtype == torch.float32
    for budget in (4096, 50, 1):
        torch.testing.assert_close(model.scores(PROMPTS, REPLIES, budget), alone, atol=1e-5, rtol=0)
    order = [3, 0, 4, 2, 1]
    turned = model.scores([PROMPTS[i] for i in order], [REPLIES[i] for i in order])
    torch.testing.assert_close(turned, alone[order], atol=1e-5, rtol=0)
    assert alone.std(dim=0).min() > 1e-3  # the replies really differ


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_saved_checkpoint_gives_the_same_outputs_in_transformers(tmp_path: Path, pad_is_end: bool):
    """Alone and right-padded. Where padding is the end token, both read at the token before it."""
    tokenizer = byte_tokenizer(pad=END) if pad_is_end else byte_tokenizer()
    padding: Any = tokenizer.pad_token_id
    model = reward_model(HEADS, tokenizer=tokenizer, pad_token_id=padding)
    model.save(tmp_path)
    encoded = model.encode(PROMPTS, REPLIES)
    rows = whole_rows(encoded)
    assert all(row[-1] == 257 for row in rows)
    ours = raw_outputs(model, encoded)
    for theirs in of_transformers(tmp_path, rows, padding):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.layout.to_units(ours), model.scores(PROMPTS, REPLIES), atol=1e-5, rtol=0)
    prompts = [encoded.prompt_ids[p] for p in encoded.prompt_of]
    cut = scores_of(model, prompts, [ids[:-1] for ids in encoded.completion_ids])
    assert torch.allclose(cut, model.scores(PROMPTS, REPLIES), atol=1e-5) == pad_is_end


@pytest.mark.parametrize(("members", "gaussian"), [(1, True), (3, False), (3, True)])
def test_ensembles_and_variances_are_outputs_that_transformers_gives_too(
    tmp_path: Path, members: int, gaussian: bool
):
    layout = Layout(heads=tuple(HEADS), members=members, gaussian=gaussian)
    model = reward_model(layout)
    model.save(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    names = [head.name for head in HEADS]
    expected = names + [f"{name}/{k}" for k in range(2, members + 1) for name in names]
    expected += ["safety/log_variance", "tone/log_variance"] * gaussian
    assert list(theirs.id2label.values()) == expected and theirs.problem_type == "regression"
    encoded = model.encode(PROMPTS, REPLIES)
    outputs = of_transformers(tmp_path, whole_rows(encoded), 256)[1]
    again = RewardModel.load(tmp_path)
    assert (again.layout.members, again.layout.gaussian) == (members, gaussian)
    torch.testing.assert_close(raw_outputs(again, encoded), outputs, atol=1e-5, rtol=0)

    found = again.predict(encoded)
    by_member = torch.stack([layout.to_units(outputs[:, 5 * k : 5 * k + 5]) for k in range(members)])
    torch.testing.assert_close(found.scores, by_member.mean(dim=0), atol=1e-4, rtol=0)
    variance = by_member.var(dim=0) if members > 1 else torch.zeros(5, 5)
    if gaussian:
        unit = torch.tensor([0.25, 1.5])
        variance[:, :2] += outputs[:, -2:].exp() * unit**2
    assert found.spread is not None
    torch.testing.assert_close(found.spread, variance.sqrt(), atol=1e-4, rtol=1e-4)


def test_one_output_a_head_has_no_spread():
    found = reward_model(HEADS).predict(reward_model(HEADS).encode(PROMPTS, REPLIES))
    assert found.spread is None and found.outside is None and found.truncated == 0
    assert found.features.shape == (5, 64)


def test_units():
    """Regression: std and mean. Binary: a probability. Ordinal: the expected level. Pairwise: as it is."""
    units = Layout(heads=tuple(HEADS)).to_units(torch.tensor([[1.0, -1.0, 0.0, 0.9, -2.0]]))
    level = 1 + torch.sigmoid(torch.tensor(0.9 + 0.3)).item() + 0.5
    torch.testing.assert_close(units, torch.tensor([[0.75, 0.5, 0.5, level, -2.0]]))


def test_save_and_load(tmp_path: Path):
    model = reward_model(HEADS, "gemma2")
    with torch.no_grad():
        model.cuts[0].add_(0.25)  # cuts are trained; what is saved is where they are by now
    model.save(tmp_path)
    again = RewardModel.load(tmp_path)
    assert again.head_names == [head.name for head in HEADS] and again.heads[:3] == tuple(HEADS[:3])
    assert again.heads[3].cuts == pytest.approx((-0.05, 1.15))
    assert torch.equal(again.scores(PROMPTS, REPLIES), model.scores(PROMPTS, REPLIES))
    half = RewardModel.load(tmp_path, dtype="bfloat16").scores(PROMPTS, REPLIES)
    assert half.dtype == torch.float32 and (half - model.scores(PROMPTS, REPLIES)).abs().max() < 0.2


def test_messages_go_through_the_chat_template():
    tokenizer = byte_tokenizer()
    model = reward_model(HEADS, tokenizer=tokenizer)
    asked = [{"role": "user", "content": "hi"}]
    plain = model.scores(["hi\n"], ["hello"])
    torch.testing.assert_close(model.scores([asked], ["hello"]), plain)
    tokenizer.chat_template = TEMPLATE
    templated = model.scores([asked], ["hello"])
    torch.testing.assert_close(templated, model.scores(["<user>hi<assistant>"], ["hello"]))
    assert not torch.allclose(templated, plain)
    encoded = model.encode([asked, asked], ["yes", "no"])
    assert len(encoded.prompt_ids) == 1 and encoded.prompt_of == [0, 0]
    row = encoded.prompt_ids[0] + encoded.completion_ids[1]
    assert tokenizer.decode(row) == "<user>hi<assistant>no<|end|>"


def test_nothing_to_read():
    model = reward_model(HEADS)
    assert scores_of(model, [[5, 6]], [[256, 256]]).shape == (1, 5)  # reads the prompt's last token
    torch.testing.assert_close(scores_of(model, [[5, 6]], [[]]), scores_of(model, [[5]], [[6]]))
    torch.testing.assert_close(scores_of(model, [[5]], [[]]), scores_of(model, [[]], [[5]]))
    with pytest.raises(UserError, match="both empty"):
        scores_of(model, [[]], [[]])
    assert model.scores([], []).shape == (0, 5)


# Other people's classifiers


@pytest.mark.parametrize("outputs", [1, 3])
def test_any_classifier_loads_and_gives_its_own_numbers(tmp_path: Path, outputs: int):
    torch.manual_seed(3)
    config = config_of("llama", num_labels=outputs)
    if outputs > 1:
        config.id2label = {0: "harmless", 1: "helpful", 2: "honest"}
    folder = tmp_path / "classifier"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    model = RewardModel.load(folder)
    assert model.head_names == (["classifier"] if outputs == 1 else ["harmless", "helpful", "honest"])
    encoded = model.encode(PROMPTS, REPLIES)
    alone, padded = of_transformers(folder, whole_rows(encoded), 256)
    for theirs in (alone, padded):
        torch.testing.assert_close(model.scores(PROMPTS, REPLIES), theirs, atol=1e-5, rtol=0)
    if outputs == 1:
        named = SavedRewardModel.read(folder, name="kind")
        assert [head.name for head in named.layout.heads] == ["kind"]
        assert torch.equal(RewardModel.load(named).scores(PROMPTS, REPLIES), model.scores(PROMPTS, REPLIES))
    else:
        with pytest.raises(UserError, match=r"3 outputs .*, which one name cannot name: leave kind= out"):
            SavedRewardModel.read(folder, name="kind")
    model.save(tmp_path / "ours")
    assert RewardModel.load(tmp_path / "ours").heads == model.heads


def test_outputs_that_nothing_names_are_refused(tmp_path: Path):
    AutoModelForSequenceClassification.from_config(config_of("llama", num_labels=2)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="nothing says what its 2 outputs rate"):
        SavedRewardModel.read(tmp_path)


def test_a_hub_model_brings_its_heads_and_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files of a hub id come from the cache, one by one."""
    made = reward_model(Layout(heads=tuple(HEADS), members=2))
    features = made.predict(made.encode(PROMPTS, REPLIES)).features
    made.statistics = FeatureStatistics.fit(features, features)
    made.save(tmp_path / "saved")
    asked: list[str] = []

    def cached(source: str, name: str, **_: object) -> str | None:
        asked.append(name)
        file = tmp_path / "saved" / name
        return str(file) if file.is_file() else None

    monkeypatch.setattr(pretrained, "cached_file", cached)
    for file in ("reward_heads.json", "feature_statistics.safetensors", "no_such_file"):
        found = pretrained.side_file("someone/model", file)
        assert found == (tmp_path / "saved" / file if file != "no_such_file" else None)
    assert asked == ["reward_heads.json", "feature_statistics.safetensors", "no_such_file"]


# New heads


def test_new_heads_on_a_language_model(tmp_path: Path):
    base = causal_model("llama")
    base.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    layout = Layout(heads=tuple(HEADS))
    model = RewardModel.from_backbone(tmp_path, layout, seed=1)
    again = RewardModel.from_backbone(tmp_path, layout, seed=1)
    other = RewardModel.from_backbone(tmp_path, layout, seed=2)
    assert torch.equal(score_weight(model), score_weight(again))
    assert not torch.equal(score_weight(model), score_weight(other))
    name = "model.embed_tokens.weight"
    assert torch.equal(model.model.get_parameter(name), base.get_parameter(name))
    (batch,) = model.pack(model.encode(PROMPTS, REPLIES), 4096)
    thrifty = RewardModel.from_backbone(tmp_path, layout, seed=1, gradient_checkpointing=True)
    gradients = []
    for each in (model, thrifty):
        each.train()(batch).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_saved_reward_model_goes_on_with_its_outputs_or_gets_new_ones(tmp_path: Path):
    first = reward_model(HEADS)
    first.save(tmp_path)
    same = RewardModel.from_backbone(tmp_path, Layout(heads=tuple(HEADS)), seed=7)
    assert torch.equal(score_weight(same), score_weight(first))
    for names in (["brevity", "wit"], list("abcde")):  # another number of outputs, and as many
        others = Layout(heads=tuple(Head(name=name) for name in names))
        new = RewardModel.from_backbone(tmp_path, others, seed=7)
        assert new.head_names == names and score_weight(new).shape == (len(names), 32)
        assert not torch.isclose(score_weight(new)[0], score_weight(first)[0], atol=1e-5).all()
        assert 0.07 < score_weight(new).std() < 0.13  # drawn as the model's other weights are
        again = RewardModel.from_backbone(tmp_path, others, seed=7)
        assert torch.equal(score_weight(new), score_weight(again))
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(new.model.get_parameter(name), first.model.get_parameter(name))


def test_lora_trains_adapter_and_heads_and_is_saved_merged(tmp_path: Path):
    causal_model("llama").save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    layout = Layout(heads=tuple(HEADS), members=2)
    model = RewardModel.from_backbone(tmp_path / "base", layout, lora=LoraSettings(rank=4))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"model.score.weight", "cuts.0"} <= trained
    assert all("lora_" in name for name in trained - {"model.score.weight", "cuts.0"})
    assert sum("lora_" in name for name in trained) == 2 * 2 * 7  # A and B of seven layers in two blocks
    assert {id(p) for p in model.trainable_parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    before = model.scores(PROMPTS, REPLIES)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    scores = model.scores(PROMPTS, REPLIES)
    assert (scores - before).abs().max() > 1e-2
    model.save(tmp_path / "tuned")
    assert not (tmp_path / "tuned" / "adapter_config.json").exists()
    torch.testing.assert_close(
        RewardModel.load(tmp_path / "tuned").scores(PROMPTS, REPLIES), scores, atol=1e-5, rtol=0
    )
    with pytest.raises(UserError, match="lora target_modules"):
        RewardModel.from_backbone(tmp_path / "base", layout, lora=LoraSettings(target_modules=("absent",)))


# Refusals


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        RewardModel.load(path)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_reward_model(tmp_path: Path):
    refused(tmp_path / "absent", "no such folder")
    causal_model().save_pretrained(tmp_path)
    refused(tmp_path, "is a Qwen2ForCausalLM; a ...ForSequenceClassification is needed")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda saved, rows: "{", "cannot be read"),
        (lambda saved, rows: [1], "cannot be read"),
        (lambda saved, rows: {}, "cannot be read: 'heads'"),
        (lambda saved, rows: {"heads": rows[:2]}, "names the outputs safety, tone, config.json has"),
        (lambda saved, rows: {"heads": rows[::-1]}, "names the outputs liked"),
        (lambda saved, rows: {"heads": []}, "at least one head"),
        (lambda saved, rows: {"heads": [rows[0]] * 2}, "none twice"),
        (lambda saved, rows: {"heads": [rows[0] | {"std": 0.0}]}, "std > 0"),
        (lambda saved, rows: {"heads": [rows[0] | {"mean": NAN}]}, "must be finite"),
        (lambda saved, rows: {"heads": [rows[0] | {"mean": "much"}]}, "must be finite"),
        (lambda saved, rows: {"heads": [rows[0] | {"kind": "rank"}]}, "kind must be"),
        (lambda saved, rows: {"heads": [rows[0] | {"colour": 1}]}, "colour"),
        (lambda saved, rows: {"heads": [rows[0] | {"name": 3}]}, "head.s name must be a text, got 3"),
        (lambda saved, rows: {"heads": [rows[3] | {"cuts": []}]}, "depth is ordinal and has no cuts"),
        (lambda saved, rows: {"heads": [rows[3] | {"cuts": 2}]}, "cannot be read"),
        (lambda saved, rows: saved | {"members": 0}, "members must be a number from 1 to"),
        (lambda saved, rows: saved | {"members": 2}, "names the outputs .*safety/2.* config.json has"),
        (lambda saved, rows: saved | {"gaussian": "yes"}, "gaussian true or false"),
        (lambda saved, rows: saved | {"colour": 1}, "colour"),
    ],
)
def test_broken_heads_file(tmp_path: Path, change, match: str):
    reward_model(HEADS).save(tmp_path)
    file = tmp_path / "reward_heads.json"
    saved = json.loads(file.read_text())
    changed = change(saved, saved["heads"])
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    refused(tmp_path, match)


def test_broken_weights(tmp_path: Path):
    reward_model(HEADS).save(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = NAN
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(tmp_path, "model.norm.weight has NaN or infinite")
    del tensors["model.norm.weight"], tensors["score.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(tmp_path, "2 weights are not in its files")
    weights.write_bytes(weights.read_bytes()[:500])
    refused(tmp_path, "cannot read its weights")


@pytest.mark.parametrize("family", ["nemotron", "qwen3_next"])
def test_a_model_that_cannot_be_packed_reads_one_reply_a_row(family: str):
    """Nemotron drops the plan, Qwen3-Next has recurrent layers: scores, features and gradients of each alone."""
    config = AutoConfig.for_model(family, **SIZES, **HYBRIDS.get(family, {}))
    model = RewardModel.from_config(config, byte_tokenizer(), Layout(heads=tuple(HEADS)))
    assert not model.packed
    prompts, owner = [[5, 6, 7], [8, 9]], [0, 0, 1]
    replies = [[10, 11], [12, 13, 14, 15], [16]]
    encoded = Encoded(prompt_ids=prompts, completion_ids=replies, prompt_of=owner)
    plain = copy.deepcopy(model.model)
    rows = [torch.tensor([prompts[p] + reply]) for p, reply in zip(owner, replies, strict=True)]
    want = torch.cat([plain(input_ids=row, use_cache=False).logits for row in rows])
    want.sum().backward()
    middle, kept = _middle_layer(plain), []
    hook = middle.register_forward_hook(
        lambda _, __, out: kept.append(out if isinstance(out, Tensor) else out[0])
    )
    for row in rows:
        plain(input_ids=row, use_cache=False)
    hook.remove()
    for together in (None, [0, 0, 0]):
        model.zero_grad()
        outputs, features = [], []
        for batch in model.pack(encoded, 6 if together is None else 99, together):
            outputs += list(zip(batch.sequence_index.tolist(), model(batch), strict=True))
            seen = model.read_with_features(batch)[1][:, : config.hidden_size]
            features += list(zip(batch.sequence_index.tolist(), seen, strict=True))
        got = torch.stack([out for _, out in sorted(outputs, key=lambda pair: pair[0])])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        got.sum().backward()
        for (name, p), q in zip(model.model.named_parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4, msg=name)
        for i, seen in features:
            size = len(replies[i])
            predicting = kept[i][0, -size - 1 : -1]
            torch.testing.assert_close(seen, predicting.mean(0), atol=1e-5, rtol=1e-4)


def test_architectures_and_tokenizers_that_do_not_fit():
    def refused_config(config, match: str, heads: list[Head] = HEADS) -> None:
        with pytest.raises(UserError, match=match):
            RewardModel.from_config(config, byte_tokenizer(), Layout(heads=tuple(heads)))

    refused_config(MambaConfig(), "mamba has no sequence classification")
    refused_config(BertConfig(vocab_size=300, hidden_size=24), "use a decoder")
    refused_config(T5Config(vocab_size=300), "T5ForSequenceClassification is an encoder-decoder")
    refused_config(BartConfig(vocab_size=300), "BartForSequenceClassification is an encoder-decoder")
    refused_config(config_of("qwen2"), "at least one head", [])
    small = config_of("qwen2", vocab_size=90, pad_token_id=None, eos_token_id=None)
    refused_config(small, "ids up to 257, the model's embedding has 90 rows")
