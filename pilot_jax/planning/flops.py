"""Counts a function's FLOPs and stored bytes from its jaxpr; nothing is allocated, compiled or run."""

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
    """Returns the FLOPs of the matrix products of `function(*arguments)`; a multiplication and an addition are two.

    Arguments may be `jax.ShapeDtypeStruct`s. The body of a scan counts once per iteration, and a cond counts as its
    most expensive branch. All else (norms, softmaxes, activations) is left out, as is usual for model FLOPs.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def saved_bytes(function: Callable, differentiated: Any, *rest: Any) -> int:
    """Returns the bytes that the forward pass of `function(differentiated, *rest)` stores for the backward pass.

    Arrays that are arguments themselves (such as weights) take no new memory and are not counted.
    """
    def residuals(differentiated, *rest):
        return jax.vjp(lambda d: function(d, *rest), differentiated)[1]

    jaxpr = jax.make_jaxpr(residuals)(differentiated, *rest).jaxpr
    stored = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - set(jaxpr.invars)
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in stored)
