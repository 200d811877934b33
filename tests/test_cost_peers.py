"""What peers are given is what our own side has, and a peer that is missing or fails is in the record."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import reward_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2ForCausalLM

from benchmarks.baselines import dpo
from benchmarks.baselines.dpo import DPO
from benchmarks.baselines.ppo import PPO
from benchmarks.cost import duels, handover, peer_table, peers
from benchmarks.cost.duels import Duel, Ring, dpo_duel, token_pairs
from benchmarks.cost.handover import TokenPair, read_pairs, run_peer, with_one_output, write_pairs
from grpo_fast.config.settings import MiniatureWorld
from grpo_fast.errors import UserError
from grpo_fast.miniature import setup
from grpo_fast.miniature.setup import tiny_config
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.miniature.world import OBJECTIVES
from grpo_fast.models.policy import Policy
from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_model import RewardModel

HEADS = [
    Head(name="polite", mean=0.4, std=0.3),
    Head(name="useful", mean=-1.0, std=2.5),
    Head(name="liked", kind="pairwise"),
]
PROMPTS = ["How do I wash a cup?", "hi", "How do I wash a cup?"]
REPLIES = ["First, get water.", "", "no"]
SMALL = Duel(
    ppo=PPO(standardize=False, epochs=1),
    ppo_steps=2,
    dpo=DPO(batches=3, samples=2),
    dpo_epochs=2,
    heldout_pairs=4,
    prompts_per_step=2,
    group_size=2,
    max_new_tokens=8,
    eval_size=6,
)


@pytest.fixture(scope="module", autouse=True)
def few_prompts():
    """Every side loads its task anew, and thousands of prompts take longer to read than these duels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "TRAINING_PROMPTS", 32)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A world's two models, untrained."""
    folder, tokenizer = tmp_path_factory.mktemp("world"), build_tokenizer()
    torch.manual_seed(0)
    shape = tiny_config(MiniatureWorld(hidden=32, layers=1, heads=2), tokenizer)
    Policy.from_model(Qwen2ForCausalLM(shape), tokenizer).save(folder / "start")
    layout = Layout(heads=tuple(Head(name=name) for name in OBJECTIVES))
    RewardModel.from_backbone(folder / "start", layout).save(folder / "reward_model")
    (folder / "reward_model" / "quality.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory) -> dict:
    """The record of a machine that has no peer."""
    folder = tmp_path_factory.mktemp("duels")
    flags = ["--seeds", "5", "--threads", "1", "--models", str(models), "--folder", str(folder)]
    assert peers.main([*flags, "--output", str(folder / "record.json")], duel=SMALL) == 0
    assert "PPO: not measured" in (folder / "record.html").read_text()
    return json.loads((folder / "record.json").read_text())


def test_missing_peers_are_in_the_record_as_not_measured(alone):
    assert alone["benchmark"] == "cost-peers" and alone["commit"] and alone["settings"]["ppo_steps"] == 2
    for found in alone["duels"].values():
        assert [run["seed"] for run in found["runs"]] == [5]
        for run in found["runs"]:
            assert run["trl"]["status"] == "not measured" and "mean" not in run["trl"]
            assert run["ours"]["status"] == "finished" and run["ours"]["seconds"] > 0
            assert run["start"]["kl"] == pytest.approx(0, abs=1e-4)
            assert run["ours"]["kl"] != run["start"]["kl"], "nothing was trained"
        assert found["verdict"]["says"] == "not measured"
    shown = peer_table.table(alone)
    assert "DPO: not measured" in shown and "PPO: not measured" in shown and "| PPO, ours |" in shown


def test_pairs_are_learned_and_what_was_not_trained_is_undecided(alone):
    for run in alone["duels"]["dpo"]["runs"]:
        assert run["start"]["pair_accuracy"] == 0.5
        assert run["start"]["pair_loss"] == pytest.approx(0.6931, abs=1e-4)
        assert (
            0 <= run["ours"]["pair_accuracy"] <= 1 and run["ours"]["pair_loss"] != run["start"]["pair_loss"]
        )


def test_our_dpo_trains_on_the_pairs_that_the_peer_is_given_in_its_order(models, tmp_path, monkeypatch):
    drawn, trained, told = [], [], []
    sample, train = dpo.new_pairs, dpo.add_up_gradients

    def sampling(*args):
        drawn.append(sample(*args))
        return drawn[-1]

    def training(lab, settings, pairs, chosen):
        trained.append(chosen)
        return train(lab, settings, pairs, chosen)

    def peer(python, script, spec, *, threads):
        told.append(spec)
        return {"status": "failed", "why": "only listened"}

    monkeypatch.setattr(dpo, "new_pairs", sampling)
    monkeypatch.setattr(dpo, "add_up_gradients", training)
    monkeypatch.setattr(duels, "run_peer", peer)
    found = dpo_duel(models, tmp_path, SMALL, 3, "python", 1, ours_first=True)
    assert found["trl"] == {"status": "failed", "why": "only listened"}
    (trained_on,), (spec,) = drawn, told
    assert token_pairs(trained_on) == read_pairs(tmp_path / "pairs.jsonl")
    batch = spec["pairs_per_step"]
    cut = [order[i : i + batch] for order in spec["orders"] for i in range(0, len(order), batch)]
    assert len(spec["orders"]) == 2 and spec["orders"][0] != spec["orders"][1]
    assert cut == trained


def plain_peer(python: str, script: str, spec: dict, *, threads: int) -> dict:
    """Stands in for TRL: the loss of SPEC["batch"] from whole logits, one sequence after the other."""
    model, reference = (AutoModelForCausalLM.from_pretrained(spec[name]) for name in ("folder", "reference"))

    def gain(prompt: list[int], reply: list[int]) -> torch.Tensor:
        row = torch.tensor([prompt + reply])
        after = [m(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (model, reference)]
        own, then = (x.gather(1, torch.tensor(reply)[:, None]).sum() for x in after)
        return own - then.detach()

    pairs = read_pairs(Path(spec["batch"]))
    margins = [gain(p.prompt_ids, p.chosen_ids) - gain(p.prompt_ids, p.rejected_ids) for p in pairs]
    loss = -torch.nn.functional.logsigmoid(spec["beta"] * torch.stack(margins)).mean()
    loss.backward()
    torch.save({name: w.grad for name, w in model.named_parameters()}, f"{spec['batch']}.trl")
    return {"status": "finished", "loss": loss.item()}


def test_our_dpo_has_the_loss_and_gradients_of_whole_logits(models, tmp_path, monkeypatch):
    monkeypatch.setattr(duels, "run_peer", plain_peer)
    monkeypatch.setattr(duels, "AGREEMENT_PAIRS", 4)
    ring = Ring.of(models, tmp_path, SMALL, 1, clip_gradients=True)
    pairs = duels.sampled_pairs(ring.lab(), SMALL.dpo)
    spec = {"reference": str(models / "start"), "beta": SMALL.dpo.beta}
    found = duels.agreement(ring, pairs, SMALL.dpo, spec, "python")
    assert found["pairs"] == 4 and abs(found["our_loss"] - 0.6931) > 1e-4, "the policy has not moved"
    with pytest.raises(AssertionError, match="our DPO differs"):
        duels.agreement(ring, pairs, SMALL.dpo, spec | {"beta": 2 * SMALL.dpo.beta}, "python")


def test_pairs_come_back_from_their_file(tmp_path):
    pairs = [
        TokenPair(prompt_ids=[1, 2], chosen_ids=[3], rejected_ids=[4, 5]),
        TokenPair(prompt_ids=[7], chosen_ids=[], rejected_ids=[8]),
    ]
    write_pairs(pairs, tmp_path / "pairs.jsonl")
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs


@torch.no_grad()
def test_one_output_stands_for_the_weighted_heads(tmp_path):
    model, weights = reward_model(HEADS), torch.tensor([1.0, -0.5, 2.0])
    single, constant = with_one_output(model, weights)
    single.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    encoded = model.encode(PROMPTS, REPLIES)
    rows = [
        encoded.prompt_ids[p] + ids for p, ids in zip(encoded.prompt_of, encoded.completion_ids, strict=True)
    ]
    found = torch.stack([loaded(input_ids=torch.tensor([row])).logits[0, 0] for row in rows]) + constant
    wanted = model.scores(PROMPTS, REPLIES) @ weights
    assert (wanted - wanted.mean()).abs().max() > 0.01, "all replies score alike"
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layout",
    [Layout(heads=(HEADS[0], Head(name="safe", kind="binary"))), Layout(heads=(HEADS[0],), members=2)],
)
def test_heads_that_no_single_output_can_stand_for_are_refused(layout):
    with pytest.raises(UserError, match="one output cannot stand for it"):
        with_one_output(reward_model(layout), torch.ones(len(layout.heads)))


def test_a_peer_that_fails_is_recorded_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(handover, "PEERS", tmp_path)
    (tmp_path / "breaks.py").write_text('print(\'{"versions": 1}\')\nraise ValueError("no such thing")')
    (tmp_path / "works.py").write_text("import sys\nprint(sys.argv[1])\nprint('{\"seconds\": 2.5}')")
    broken = run_peer(sys.executable, "breaks.py", {}, threads=1)
    assert broken == {"status": "failed", "why": "ValueError: no such thing", "versions": 1}
    assert run_peer(sys.executable, "works.py", {"seed": 7}, threads=1) == {
        "status": "finished",
        "seed": 7,
        "seconds": 2.5,
    }
    absent = run_peer(str(tmp_path / "python"), "works.py", {}, threads=1)
    assert absent["status"] == "failed" and "No such file" in absent["why"]


def test_nothing_but_answers_reaches_a_peers_standard_output():
    code = (
        "from benchmarks.peers.answers import answer, check_tokens\n"
        "class Tokenizer:\n    def encode(self, text, add_special_tokens): return [len(text)]\n"
        "print('noise')\ncheck_tokens(Tokenizer(), 'abc', [3])\nanswer({'fine': True})\n"
        "check_tokens(Tokenizer(), 'abc', [4])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout == '{"fine": true}\n'
    assert done.returncode == 1 and "'abc' became [3], not [4]" in done.stderr


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ([0.60, 0.62, 0.61], [0.50, 0.51, 0.52], "above"),
        ([0.50, 0.51, 0.52], [0.60, 0.62, 0.61], "below"),
        ([0.50, 0.62, 0.55], [0.52, 0.58, 0.56], "not told apart"),
        ([0.602, 0.501, 0.553], [0.603, 0.503, 0.554], "level"),
        ([0.60], [0.50], "one seed"),
    ],
)
def test_the_verdict_is_the_interval_of_the_differences(ours, theirs, says):
    runs = [
        {"ours": {"status": "finished", "mean": a}, "trl": {"status": "finished", "mean": b}}
        for a, b in zip(ours, theirs, strict=True)
    ]
    unfinished = {"ours": {"status": "finished", "mean": 9.0}, "trl": {"status": "failed", "why": "x"}}
    diverged = {"ours": {"status": "diverged", "why": "y"}, "trl": {"status": "finished", "mean": 0.5}}
    found = peer_table.verdict([*runs, unfinished, diverged])
    assert found["says"] == says and found["seeds"] == len(ours)
    assert found["difference"] == pytest.approx(sum(ours) / len(ours) - sum(theirs) / len(theirs))
    if found["ci95"]:
        low, high = found["ci95"]
        assert low < found["difference"] < high
    assert peer_table.verdict([unfinished]) == {"says": "failed", "why": "x"}
    assert peer_table.verdict([diverged]) == {"says": "diverged", "why": "y"}


def test_models_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match="needs start/ and reward_model/"):
        peers.main(["--models", str(tmp_path)])


def test_a_finished_duel_is_not_run_again_except_on_other_terms(tmp_path, monkeypatch):
    fought = []

    def fight(models, place, duel, seed, python, threads, *, ours_first):
        place.mkdir(parents=True, exist_ok=True)
        fought.append((seed, ours_first))
        side = {"status": "finished", "mean": 0.5}
        return {"seed": seed, "start": {}, "ours": side, "trl": side}

    monkeypatch.setattr(peers, "DUELS", {"dpo": fight})
    pythons = {"dpo": "python"}
    first = peers.measure(tmp_path, tmp_path, SMALL, pythons, [0, 1], 1)
    again = peers.measure(tmp_path, tmp_path, SMALL, pythons, [0, 1, 2], 1)
    assert fought == [(0, True), (1, False), (2, True)], "the sides do not begin by turns"
    assert again["duels"]["dpo"]["runs"][:2] == first["duels"]["dpo"]["runs"]
    assert again["duels"]["dpo"]["verdict"]["says"] == "level"
    peers.measure(tmp_path, tmp_path, replace(SMALL, ppo_steps=3), pythons, [0], 1)
    peers.measure(tmp_path, tmp_path, SMALL, {"dpo": "another"}, [1], 1)
    assert fought[3:] == [(0, True), (1, False)]
