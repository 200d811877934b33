"""What the operators share on their way into PyTorch's dispatcher."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.autograd.function import once_differentiable

from ._arguments import check_number

Function = TypeVar("Function", bound=Callable[..., Any])


def shapes_of(operator: Any) -> Callable[[Function], Function]:
    """Decorator: the function gives the operator's outputs without their values, as tracing needs them.

    ``operator`` is what ``torch.library.custom_op`` made; it leaves the types of its methods open.
    """
    return operator.register_fake


def set_gradient(operator: Any, backward: Callable[..., Any], *, save: Callable[..., None]) -> None:
    """Register the operator's gradient, which has none of its own; ``save`` keeps what it needs of the forward."""
    operator.register_autograd(once_differentiable(backward), setup_context=save)


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of the leaves; without elements where one is not needed."""
    d_hidden, d_weight, d_bias = (
        leaf.new_empty(leaf.shape if need else 0)
        for leaf, need in zip((hidden, weight, hidden if bias is None else bias), needs, strict=True)
    )
    return d_hidden, d_weight, d_bias


def split_normalizer(normalizer: float | Tensor | None) -> tuple[Tensor | None, float | None]:
    """The normalizer as a schema takes it: a tensor or a number, the other None. TypeError where it is neither."""
    if normalizer is None or isinstance(normalizer, Tensor):
        return normalizer, None
    check_number("normalizer", normalizer)
    return None, float(normalizer)


def by_name(names: Sequence[str], measured: Tensor) -> dict[str, Tensor]:
    """Metrics by their names, from the one tensor (names,) in which an operator gives them."""
    return dict(zip(names, measured.detach().unbind(), strict=True))


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient · factor, in place: it is large and nobody else holds it.

    A factor of one is free to skip on the CPU only, where reading it does not wait for anything. While a graph is
    traced it is a plain product.
    """
    gradient = gradient.detach()  # as an output of the operator it is tied to the graph
    if type(factor) is not Tensor:
        return gradient * factor
    if factor.device.type != "cpu" or float(factor) != 1.0:
        gradient.mul_(factor)
    return gradient
