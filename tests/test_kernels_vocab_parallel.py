"""The vocabulary shared out over processes gives what one process gives: values, gradients, awkward rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from grpo_kernels import linear_logprob, reference

SIZES = [17, 1, 23]  # rows of each rank: ragged, and one that may have nothing but the target
N, H, V = 12, 8, sum(SIZES)

CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6, "logit_scale": 1.3},
    "softcap": {"softcap": 3.0},
    "bias": {"bias": True},
    "far": {"spread": 2000.0},
    "certain": {"certain": True},
}


def problem(name: str, dtype: torch.dtype):
    """Leaves [hidden, weight, bias or None], targets, options."""
    options = dict(CASES[name])
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, H, generator=random, dtype=torch.float64)
    weight = torch.randn(V, H, generator=random, dtype=torch.float64) * options.pop("spread", 1.0)
    targets = torch.randint(0, V, (N,), generator=random)
    targets[:4] = torch.tensor([0, 16, 17, V - 1])  # first and last of shards, and the shard of one
    if options.pop("certain", False):
        hidden = weight[targets] * 2  # probabilities near one
    bias = None
    if options.pop("bias", False):
        bias = torch.randn(V, generator=random, dtype=torch.float64)
        bias[5] = -torch.inf
        targets[targets == 5] = 6
        bias = bias.to(dtype)
    return [hidden.to(dtype), weight.to(dtype), bias], targets, options


def run(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(SIZES))
    start = sum(SIZES[:rank])
    mine = slice(start, start + SIZES[rank])
    results = {}
    for name in CASES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            (hidden, weight, bias), targets, options = problem(name, dtype)
            leaves = [hidden.requires_grad_(), weight[mine].clone().requires_grad_()]
            if bias is not None:
                leaves.append(bias[mine].clone().requires_grad_())
                options["bias"] = leaves[2]
            found = linear_logprob(
                leaves[0], leaves[1], targets, vocab_group=dist.group.WORLD, vocab_start=start, **options
            )
            gradients = torch.autograd.grad(found[0].sum() + 0.3 * found[1].sum(), leaves)
            results[name, dtype] = [part.detach() for part in (*found, *gradients)]
    (hidden, weight, _), targets, _ = problem("plain", torch.float32)
    try:
        linear_logprob(
            hidden, weight[mine], targets.clone().fill_(V), vocab_group=dist.group.WORLD, vocab_start=start
        )
        results["unknown"] = "nothing"
    except ValueError as error:
        results["unknown"] = str(error)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    processes.spawn(run, args=(f"file://{folder / 'store'}", str(folder)), nprocs=len(SIZES))  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(SIZES))]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_shared_out_equals_whole(found, name, dtype, tolerance):
    leaves, targets, options = problem(name, dtype)
    exact: list[Any] = [None if leaf is None else leaf.double().requires_grad_() for leaf in leaves]
    if exact[2] is not None:
        options["bias"] = exact[2]
    true = reference.linear_logprob(exact[0], exact[1], targets, **options)
    trained = [leaf for leaf in exact if leaf is not None]
    wanted = torch.autograd.grad(true[0].sum() + 0.3 * true[1].sum(), trained)
    largest = float((exact[0] @ exact[1].T).abs().max())  # float32 logits are rounded at their own size
    for rank in found:
        logprobs, entropy, d_hidden = rank[name, dtype][:3]
        near = 1e-11 if dtype == torch.float64 else 4e-6 + 2.0**-21 * largest
        for ours, theirs in zip((logprobs, entropy), true, strict=True):
            torch.testing.assert_close(ours.double(), theirs.detach(), rtol=min(near, 1e-5), atol=near)
        if name == "certain" and dtype == torch.float32:
            torch.testing.assert_close(logprobs.double(), true[0].detach(), rtol=1e-3, atol=0.0)
        assert close(d_hidden, wanted[0], tolerance)
    for place in range(1, len(trained)):
        assert close(torch.cat([rank[name, dtype][2 + place] for rank in found]), wanted[place], tolerance)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    return bool((ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-3))


def test_a_target_that_no_rank_has_is_named(found):
    for rank in found:
        assert rank["unknown"].startswith(
            f"targets must each lie in one rank's rows of the vocabulary, targets[0] = {V}"
        )


def test_a_start_without_a_group_is_refused():
    with pytest.raises(ValueError, match="vocab_start = 3 needs vocab_group"):
        linear_logprob(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), vocab_start=3)


def test_the_triton_backends_are_refused_by_name():
    with pytest.raises(ValueError, match="backend must be auto or torch with vocab_group, got 'triton'"):
        linear_logprob(
            torch.zeros(2, 4),
            torch.zeros(3, 4),
            torch.zeros(2, dtype=torch.long),
            backend="triton",
            vocab_group=object(),  # type: ignore[arg-type]
        )
