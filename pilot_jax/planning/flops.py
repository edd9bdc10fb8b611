"""What a function costs, read off its jaxpr: nothing is allocated, compiled or run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def _inner(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [j for item in value for j in _inner(item)] if isinstance(value, tuple | list) else []


def _flops(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(
                eqn.invars[0].aval.shape[i] for i in contracting)
        inner = [j for value in eqn.params.values() for j in _inner(value)]
        if eqn.primitive.name == "while":
            raise ValueError("the flops of a while loop depend on its data")
        if eqn.primitive.name == "cond":
            total += max((_flops(j) for j in inner), default=0)
        else:
            total += eqn.params.get("length", 1) * sum(_flops(j) for j in inner)
    return total


def matmul_flops(function: Callable, *arguments: Any) -> int:
    """Floating-point operations of the matrix products of `function(*arguments)`, a multiply and an add being two.

    Arguments may be `jax.ShapeDtypeStruct`s. A scan counts as often as it runs; of a cond, the dearest branch. What
    is no matrix product (norms, softmaxes, activations) is left out, as is usual for model FLOPs.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def saved_bytes(function: Callable, differentiated: Any, *rest: Any) -> int:
    """Bytes that the forward pass of `function(differentiated, *rest)` keeps for its gradient.

    What is kept but is itself an argument (weights) takes no new memory and is not counted.
    """
    def keep(differentiated, *rest):
        return jax.vjp(lambda d: function(d, *rest), differentiated)[1]

    jaxpr = jax.make_jaxpr(keep)(differentiated, *rest).jaxpr
    kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - set(jaxpr.invars)
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)
