"""What the kernels refuse, and that the message says what was wrong and what would be right."""

import re
from typing import Any

import pytest
import torch
from grpo_kernels import LossConfig, group_advantages, grpo_loss, linear_grpo_loss, linear_logprob
from grpo_kernels._arguments import check_tensors, may_read
from kernel_cases import tensors


@pytest.mark.parametrize(
    ("field", "wrong", "near"),
    [
        ("surrogate", "clipp", "clip"),
        ("surrogate", "Reinforce", "reinforce"),
        ("kl", "k3_correct", "k3_corrected"),
        ("aggregation", "tokenmean", "token_mean"),
        ("ratio_level", "sequences", "sequence"),
        ("mismatch", "truncated", "truncate"),
    ],
)
def test_the_nearest_choice_of_a_loss_is_named(field: str, wrong: str, near: str):
    with pytest.raises(
        ValueError, match=rf"^{field} must be one of .*; got '{wrong}'; did you mean '{near}'\?$"
    ):
        LossConfig.preset("grpo", **{field: wrong})


def test_a_name_like_none_gets_no_suggestion():
    for wrong in ("zzz", 3, None):
        with pytest.raises(ValueError, match=rf"^surrogate must be one of clip, .*; got {wrong!r}$"):
            LossConfig(surrogate=wrong)  # type: ignore[arg-type]


def test_the_nearest_backend_mode_and_scale_are_named():
    logprobs, rewards = torch.zeros(4), torch.randn(8, 2)
    (hidden, weight), targets = tensors(4, 3, 11, dtype=torch.float32)
    config = LossConfig.preset("dapo")
    calls: list[tuple[Any, str]] = [
        (lambda: linear_logprob(hidden, weight, targets, backend="tirton"), "backend .*'tirton'.* 'triton'"),
        (lambda: linear_logprob(hidden, weight, targets, backend="fuse"), "backend .*'fuse'.* 'fused'"),
        (
            lambda: linear_grpo_loss(hidden, weight, targets, logprobs, config, backend="Torch"),
            "backend .*'Torch'.* 'torch'",
        ),
        (lambda: grpo_loss(logprobs, logprobs, config, backend="tritton"), "backend .*'tritton'.* 'triton'"),
        (lambda: group_advantages(rewards, backend="atuo"), "backend .*'atuo'.* 'auto'"),
        (lambda: group_advantages(rewards, mode="gdop"), "mode .*'gdop'.* 'gdpo'"),  # type: ignore[arg-type]
        (lambda: group_advantages(rewards, scale="groups"), "scale .*'groups'.* 'group'"),  # type: ignore[arg-type]
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match="^" + message.replace(".* '", r".*; did you mean '") + r"\?$"):
            call()


READ_BY = {
    "clip_low": (0.3, {"surrogate": "clip"}, "surrogate 'clip'"),
    "clip_high": (0.3, {"surrogate": "cispo"}, "surrogate 'clip', 'cispo'"),
    "sapo_tau_pos": (2.0, {"surrogate": "sapo"}, "surrogate 'sapo'"),
    "sapo_tau_neg": (2.0, {"surrogate": "sapo"}, "surrogate 'sapo'"),
    "gamma_pos": ((1.0, 1.0), {"surrogate": "gamma"}, "surrogate 'gamma'"),
    "gamma_neg": ((1.0, 1.0), {"surrogate": "gamma"}, "surrogate 'gamma'"),
    "mismatch_low": (0.1, {"mismatch": "sequence_mask"}, "mismatch 'mask', 'sequence_mask'"),
    "mismatch_high": (3.0, {"mismatch": "truncate"}, "mismatch 'truncate', 'mask', 'sequence_mask'"),
}


@pytest.mark.parametrize("field", READ_BY)
def test_a_number_that_nothing_reads_is_refused(field: str):
    """It begins with the field, which is how the trainer finds the setting's line."""
    value, reader, names = READ_BY[field]
    assert getattr(LossConfig.preset("grpo", **{field: value}, **reader), field) == value
    other = "reinforce" if "surrogate" in reader else "none"
    choice = next(iter(reader))
    with pytest.raises(ValueError, match=f"^{field} is used by {names} only, got {choice} '{other}'; leave"):
        LossConfig.preset("grpo", **{field: value, choice: other})
    default = getattr(LossConfig(), field)
    assert LossConfig.preset("grpo", **{field: default, choice: other}) == LossConfig.preset(
        "grpo", **{choice: other}
    )


def test_every_number_changes_the_loss_of_its_readers():
    logprobs = torch.linspace(-3, -1, 8, dtype=torch.float64)
    given: Any = {
        "old_logprobs": logprobs - torch.linspace(-1, 0.8, 8),
        "rollout_logprobs": logprobs - torch.linspace(1.5, -3.7, 8),
        "cu_seqlens": torch.tensor([0, 8]),
    }

    def loss(**fields: Any) -> float:
        config = LossConfig.preset("dapo", **fields)
        return float(grpo_loss(logprobs, torch.linspace(-1, 1.1, 8).double(), config, **given)[0])

    for field, (value, reader, _) in READ_BY.items():
        assert loss(**reader) != loss(**reader, **{field: value}), field


def test_a_preset_leaves_behind_what_another_surrogate_does_not_read():
    for preset in ("grpo", "dapo", "cispo", "sapo", "vespo", "rloo", "reinforce_pp", "dr_grpo"):
        for surrogate in ("clip", "cispo", "sapo", "gamma", "reinforce"):
            config = LossConfig.preset(preset, surrogate=surrogate)
            assert config.surrogate == surrogate
    assert LossConfig.preset("dapo", surrogate="reinforce").clip_high == LossConfig().clip_high
    assert LossConfig.preset("dapo", surrogate="cispo").clip_high == 0.28
    with pytest.raises(ValueError, match=r"^clip_high is used by surrogate"):
        LossConfig.preset("dapo", surrogate="reinforce", clip_high=0.28)


def test_a_cap_below_the_lower_bound_that_truncate_does_not_read():
    assert LossConfig(mismatch="truncate", mismatch_high=0.3).mismatch_high == 0.3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_low", None),
        ("kl_coef", True),
        ("gamma_pos", 2.0),
        ("gamma_neg", [1.0, 1.0]),
        ("gamma_pos", (1.0, None)),
    ],
)
def test_values_of_a_wrong_kind_are_named(field: str, value: Any):
    with pytest.raises(ValueError, match=rf"^{field} must be a .*; got "):
        LossConfig.preset("grpo", **{field: value})


LP = torch.zeros(6)
CU = torch.tensor([0, 2, 6])
ELSEWHERE = {
    "advantages": torch.zeros(6, device="meta"),
    "old_logprobs": torch.zeros(6, device="meta"),
    "ref_logprobs": torch.zeros(6, device="meta"),
    "rollout_logprobs": torch.zeros(6, device="meta"),
    "loss_mask": torch.ones(6, dtype=torch.bool, device="meta"),
    "cu_seqlens": torch.zeros(3, dtype=torch.int64, device="meta"),
}


def given(**changes: Any) -> dict[str, Any]:
    """Arguments of a loss of six tokens, these replaced."""
    return {
        "advantages": torch.ones(6),
        "config": LossConfig(),
        "ref_logprobs": LP,
        "cu_seqlens": CU,
    } | changes


def head(**changes: Any) -> dict[str, Any]:
    """A head of six tokens."""
    (hidden, weight), targets = tensors(6, 3, 11, dtype=torch.float32)
    return {"hidden": hidden, "weight": weight, "targets": targets} | changes


@pytest.mark.parametrize("name", [*ELSEWHERE, "entropy"])
def test_tensors_on_another_device_are_refused(name: str):
    changes = {name: ELSEWHERE.get(name, ELSEWHERE["old_logprobs"])}
    with pytest.raises(ValueError, match=rf"^{name} must be on the device of logprobs, cpu, got meta$"):
        grpo_loss(LP, **given(**changes))
    if name != "entropy":
        with pytest.raises(ValueError, match=rf"^{name} must be on the device of hidden, cpu, got meta$"):
            linear_grpo_loss(**head(), **given(**changes))


def test_what_the_head_may_be_given_from_the_host():
    """Tensors on the CPU pass where they tell the host which tokens to leave out, and nowhere else."""
    device, here = torch.device("meta"), torch.zeros(3)
    check_tensors(
        "hidden", device, or_cpu=True, loss_mask=here, advantages=ELSEWHERE["advantages"], nothing=None
    )
    with pytest.raises(ValueError, match=r"^loss_mask must be on the device of logprobs, meta, got cpu$"):
        check_tensors("logprobs", device, loss_mask=here)
    with pytest.raises(ValueError, match=r"^loss_mask must be .*, cuda:1, or on the CPU, got meta$"):
        check_tensors("hidden", torch.device("cuda:1"), or_cpu=True, loss_mask=ELSEWHERE["loss_mask"])
    with pytest.raises(TypeError, match=r"^old_logprobs must be a tensor, got list$"):
        grpo_loss(LP, **given(old_logprobs=[0.0] * 6))


def test_a_normalizer_may_be_a_number_or_a_tensor_without_dimensions():
    plain, _ = grpo_loss(LP, **given(normalizer=4))
    for other in (4.0, torch.tensor(4), torch.tensor(4.0, dtype=torch.float64)):
        assert torch.equal(grpo_loss(LP, **given(normalizer=other))[0], plain)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_as_many_advantages_as_tokens_and_sequences(backend: str):
    """Sequences of one token: by token and by sequence is the same. Empty and longer ones: nobody can tell."""
    advantages, old = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.1, -0.1, 0.3])
    single = grpo_loss(
        torch.zeros(3, requires_grad=True),
        advantages,
        LossConfig.preset("gspo"),
        old_logprobs=old,
        cu_seqlens=torch.arange(4),
        backend=backend,
    )[0]
    # by sequence, told so by a fourth one that is empty and counts in the normalizer alone
    padded = grpo_loss(
        torch.zeros(3, requires_grad=True),
        torch.cat([advantages, torch.ones(1)]),
        LossConfig.preset("gspo"),
        old_logprobs=old,
        cu_seqlens=torch.tensor([0, 1, 2, 3, 3]),
        normalizer=3,
        backend=backend,
    )[0]
    torch.testing.assert_close(single, padded)
    for bounds in ([0, 0, 1, 3], [0, 2, 3, 3]):
        cu_seqlens = torch.tensor(bounds)
        with pytest.raises(
            ValueError, match=r"^advantages of shape \(3,\) may be by token or by sequence: cu_seq"
        ):
            grpo_loss(LP[:3], advantages, LossConfig.preset("gspo"), cu_seqlens=cu_seqlens, backend=backend)
        kept = torch.tensor(sorted(set(bounds)))  # without the empty sequence there is no doubt
        for fewer in (advantages, advantages[:2]):
            grpo_loss(LP[:3], fewer, LossConfig.preset("gspo"), cu_seqlens=kept, backend=backend)


WRONG_NUMBERS: list[Any] = ["1", True, None, 1j, torch.tensor(1.0), [1.0]]


@pytest.mark.parametrize("wrong", WRONG_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["temperature", "logit_scale", "softcap"])
def test_what_is_no_number_is_refused_by_name(name: str, wrong: Any):
    if name == "softcap" and wrong is None:
        return
    for call in (linear_logprob, lambda **options: linear_grpo_loss(**options, **given())):
        with pytest.raises(TypeError, match=f"^{name} must be a number, got "):
            call(**head(**{name: wrong}))


def test_numbers_of_other_libraries_and_integers_pass():
    np = pytest.importorskip("numpy")
    found = linear_logprob(**head(temperature=2, softcap=np.float32(3.0), logit_scale=np.int64(1)))
    wanted = linear_logprob(**head(temperature=2.0, softcap=3.0))
    for ours, other in zip(found, wanted, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("name", "shape", "kinds"),
    [
        ("hidden", (6, 3), [torch.complex64, torch.int64, torch.bool]),
        ("weight", (11, 3), [torch.complex64, torch.int32, torch.bool]),
        ("bias", (11,), [torch.complex64, torch.int64, torch.bool]),
        ("targets", (6,), [torch.complex64, torch.float32, torch.bool]),
    ],
)
def test_dtypes_of_the_head(name: str, shape: tuple[int, ...], kinds: list[torch.dtype], autocast: bool):
    for kind in kinds:
        arguments = head(**{name: torch.zeros(shape, dtype=kind)})
        mixed = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
        with mixed, pytest.raises(TypeError, match=f"^{name} must .*, got {kind}$"):
            linear_logprob(**arguments)


def test_dtypes_of_the_losses_arguments():
    whole = [torch.complex64, torch.bool]
    cases = {"old_logprobs": [*whole, torch.int64], "ref_logprobs": whole, "rollout_logprobs": whole}
    cases |= {"entropy": [*whole, torch.int32], "advantages": whole, "normalizer": whole}
    for name, kinds in cases.items():
        for kind in kinds:
            value = torch.ones(() if name == "normalizer" else 6, dtype=kind)
            with pytest.raises(TypeError, match=f"^{name} must be floating point.*, got {kind}$"):
                grpo_loss(LP, **given(**{name: value}))
    with pytest.raises(ValueError, match=r"^loss_mask must be bool or integer .*complex64"):
        grpo_loss(LP, **given(loss_mask=torch.ones(6, dtype=torch.complex64)))
    for wrong in ("4", True, [4.0]):
        with pytest.raises(TypeError, match=r"^normalizer must be a number, got "):
            grpo_loss(LP, **given(normalizer=wrong))
    for wrong in (float("nan"), float("inf"), torch.tensor(float("inf"))):
        with pytest.raises(ValueError, match=r"^normalizer must be positive and finite"):
            grpo_loss(LP, **given(normalizer=wrong))
    integers, _ = grpo_loss(LP, **given(advantages=torch.tensor([1, -1, 1, 2, 0, 1])))
    assert torch.equal(integers, grpo_loss(LP, **given(advantages=torch.tensor([1.0, -1, 1, 2, 0, 1])))[0])


def test_complex_rewards_and_weights():
    with pytest.raises(TypeError, match=r"^rewards must be real numbers, got torch.complex64$"):
        group_advantages(torch.zeros(8, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"^weights must be floating point or integer, got torch.complex64$"):
        group_advantages(torch.zeros(8, 1), weights=torch.ones(1, dtype=torch.complex64))


def test_values_are_read_on_the_cpu_and_in_debugging(monkeypatch: pytest.MonkeyPatch):
    elsewhere = ELSEWHERE["cu_seqlens"]
    monkeypatch.delenv("GRPO_KERNELS_DEBUG", raising=False)
    assert may_read(CU) and not may_read(elsewhere)
    monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
    assert may_read(CU) and may_read(elsewhere)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 4, 3, 6], "cu_seqlens must rise from 0 to N = 6"),
        ([0, 5], "cu_seqlens must rise from 0 to N = 6"),
        ([1, 6], "cu_seqlens must rise from 0 to N = 6"),
        ([0, 0, 1, 2, 3, 4, 6], "advantages of shape (6,) may be by token or by sequence"),
    ],
)
def test_boundaries_are_read_where_values_may_be(
    monkeypatch: pytest.MonkeyPatch, bounds: list[int], message: str
):
    """What stands for a GPU here: tensors whose values are not to be read, until the environment says so."""
    from grpo_kernels import _loss_arguments

    arguments: dict[str, Any] = dict.fromkeys(
        ("old_logprobs", "ref_logprobs", "rollout_logprobs", "loss_mask")
    )
    arguments |= {"cu_seqlens": torch.tensor(bounds), "normalizer": torch.tensor(2.0)}
    arguments |= {"device": LP.device, "dtype": LP.dtype}
    config = LossConfig.preset("gspo")
    monkeypatch.setattr(_loss_arguments, "may_read", lambda values: False)
    assert not _loss_arguments.check(config, 6, torch.ones(6), **arguments).by_sequence
    monkeypatch.setattr(_loss_arguments, "may_read", lambda values: True)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        _loss_arguments.check(config, 6, torch.ones(6), **arguments)
