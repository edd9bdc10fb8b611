"""Jitted functions whose compiled programs are kept in the user's cache, and can be compiled in a thread beforehand.

A kept program is found by everything that it was compiled from: the function, its static arguments, the shapes and
shardings of the others, the source of this package, and the versions of libraries and machine. So a later run neither
traces nor compiles it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import inspect
import pickle
import platform
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from pilot_jax.cache import Cache, source_digest, version_of
from pilot_jax.parallel.allocator import give_back
from pilot_jax.parallel.devices import compiler_options, flags_of_xla, jax_keeps_programs, options_of_programs

THREADS = "compile-ahead"
WAITED = "/pilot_jax/waited_for_program_duration"  # event: seconds in which a call has waited for `compile_ahead`
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "qwix")
_store: Cache | None = None


def keep_in(store: Cache | None) -> None:
    """Makes every `KeptJit` keep compiled programs in a cache; None: they are not kept."""
    global _store
    _store = store


def in_compiling_thread() -> bool:
    """Whether the caller runs in the thread of `KeptJit.compile_ahead`."""
    return threading.current_thread().name.startswith(THREADS)


class _NotKeepable(Exception):
    """A static argument holds something of which no description tells all, such as a function."""


def _numbers(mesh: jax.sharding.Mesh) -> list[int]:
    return [device.id for device in cast(Any, mesh).devices.flat]


def _described(value: Hashable) -> str:
    """Returns a text that differs for different static arguments.

    Raises:
        _NotKeepable: the value has parts for which there is no such text, or whose code is not this package's.
    """
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if value is None or isinstance(value, bool | int | float | str | np.dtype | jax.sharding.PartitionSpec):
        return f"{name}:{value!r}"
    if isinstance(value, type) and issubclass(value, np.generic):
        return f"dtype:{np.dtype(value)}"
    if isinstance(value, jax.sharding.Mesh):
        return f"{name}:{value.axis_names}{value.devices.shape}{_numbers(value)}{value.axis_types}"
    if isinstance(value, jax.sharding.NamedSharding):
        return f"{name}:{value.spec}{value.memory_kind}{_described(value.mesh)}"
    if isinstance(value, jax.sharding.SingleDeviceSharding):
        return f"{name}:{[d.id for d in cast(Any, value).device_set]}{value.memory_kind}"
    if isinstance(value, tuple):
        return f"{name}({','.join(map(_described, value))})"
    if isinstance(value, frozenset):
        return f"{name}({','.join(sorted(map(_described, value)))})"
    if dataclasses.is_dataclass(value) and kind.__module__.split(".")[0] == "pilot_jax":
        fields = [f.name for f in dataclasses.fields(value)]
        if "parent" in fields:  # a Flax module, whose parent and name say where it is used, not what it computes
            fields = [n for n in fields if n not in ("parent", "name")]
        return f"{name}({','.join(f'{n}={_described(getattr(value, n))}' for n in fields)})"
    raise _NotKeepable(name)


@functools.cache
def surroundings() -> str:
    """Returns a text of everything that all programs depend on: source, libraries, machine and flags."""
    cpu = Path("/proc/cpuinfo")
    features = {line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features", "model name"))
             } if cpu.is_file() else set()
    devices = [(d.platform, d.device_kind, d.id) for d in jax.devices()]
    return repr((source_digest(), [version_of(name) for name in LIBRARIES], platform.machine(), platform.node(),
                 platform.python_version(), sorted(features), devices, jax.devices()[0].client.platform_version,
                 flags_of_xla()))


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call's static arguments, and the structure, shapes, types and places of the other ones."""

    static: tuple[Any, ...]
    structure: Any
    leaves: tuple[tuple[Any, ...], ...]
    options: tuple[Any, ...]

    def text(self) -> str:
        """Returns a text that differs for different calls, or raises `_NotKeepable`."""
        leaves = [(shape, str(dtype), weak, None if place is None else _described(place))
                  for shape, dtype, weak, place in self.leaves]
        return repr((_described(self.static), str(self.structure), leaves, self.options))


def _leaf(leaf: Any) -> tuple[Any, ...]:
    place = leaf.sharding if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
    if isinstance(leaf, jax.Array) and not leaf.committed:
        place = None
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf)
    return np.shape(leaf), dtype, getattr(leaf, "weak_type", not hasattr(leaf, "dtype")), place


class KeptJit:
    """A jitted function. With `keep_in`, its compiled programs are kept; without, it is what `jax.jit` makes of it.

    Args:
        function: a function of positional and keyword arguments.
        static: names of its static arguments.
        donate: names of arguments whose memory may be used for the results.
        compile_fast: whether it is compiled with `devices.compiler_options`; False for what these make slower.
    """

    _threads = ThreadPoolExecutor(1, thread_name_prefix=THREADS)

    def __init__(self, function: Callable[..., Any], static: Sequence[str] = (), donate: Sequence[str] = (),
                 compile_fast: bool = True) -> None:
        self._jit = partial(jax.jit, function, static_argnames=tuple(static), donate_argnames=tuple(donate))
        self.jitted = self._jit()  # has no compiler options, which JAX refuses inside another jitted function
        self._static, self._signature = tuple(static), inspect.signature(function)
        self._options = compiler_options if compile_fast else dict[str, str | bool]
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._ready: dict[_Call, Future[Any]] = {}
        self._lock = threading.Lock()
        functools.update_wrapper(self, function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jitted, name)  # lower, trace, eval_shape, …

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._bound(args, kwargs)
        positional, by_name = self._dynamic(bound)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((positional, by_name))):
            return self.jitted(*args, **kwargs)
        if _store is None or jax.process_count() > 1:
            return self._outermost(*args, **kwargs)
        return self._program(bound)(*positional, **by_name)

    @functools.cached_property
    def _outermost(self) -> Callable[..., Any]:
        """The jitted function for calls that are not part of another program; made when JAX may be started."""
        return self._jit(compiler_options=self._options())

    def _cache_size(self) -> int:
        """Returns the number of programs that calls have compiled without `keep_in`, as of JAX's jitted functions."""
        return cast(int, self._outermost._cache_size())  # type: ignore[attr-defined]

    def compile_ahead(self, *args: Any, **kwargs: Any) -> None:
        """Starts to load or compile the program for such arguments, of which shapes are enough, in a thread.

        A call that needs the program waits for it. Without `keep_in`, nothing is done.
        """
        if _store is not None and jax.process_count() == 1:
            self._threads.submit(self._program, self._bound(args, kwargs))

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound

    def _dynamic(self, bound: inspect.BoundArguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the positional and the keyword arguments that a compiled program takes."""
        args = tuple(v for n, v in zip(self._signature.parameters, bound.args, strict=False) if n not in self._static)
        return args, {n: v for n, v in bound.kwargs.items() if n not in self._static}

    def _call(self, bound: inspect.BoundArguments) -> _Call:
        leaves, structure = jax.tree.flatten(self._dynamic(bound))
        given = bound.arguments | bound.kwargs  # the latter has what `**options` collects one by one
        return _Call(tuple(given.get(name) for name in self._static), structure, tuple(map(_leaf, leaves)),
                     options_of_programs())

    def _program(self, bound: inspect.BoundArguments) -> Callable[..., Any]:
        """Returns the compiled program for these arguments; one thread makes it, and others wait."""
        call = self._call(bound)
        with self._lock:
            future = self._ready.get(call)
            if is_new := future is None:
                future = self._ready[call] = Future()
        if is_new:
            try:
                future.set_result(self._made(call, bound))
            except BaseException as error:
                with self._lock:
                    del self._ready[call]
                future.set_exception(error)
        elif not future.done():
            began = time.perf_counter()
            futures.wait([future])
            jax.monitoring.record_event_duration_secs(WAITED, time.perf_counter() - began)
        return future.result()

    def _made(self, call: _Call, bound: inspect.BoundArguments) -> Callable[..., Any]:
        """Returns the program, loaded from the cache or compiled."""
        # XLA cannot serialise what it has itself loaded from JAX's compilation cache, so there is one or the other.
        store, key = None if jax_keeps_programs() else _store, ""
        with contextlib.suppress(_NotKeepable):
            key = f"{self._name} {surroundings()} {call.text()}"
        content = None if store is None or not key else store.read(key)
        if content is not None:
            # A program that JAX refuses, in spite of its key, is compiled again.
            with contextlib.suppress(Exception):
                numbers, program, takes, returns = pickle.loads(content)
                known = {device.id: device for device in jax.devices()}
                loaded = deserialize_and_load(program, takes, returns,
                                              execution_devices=[known[number] for number in numbers])
                return _Tried(loaded, lambda: self._compiled(bound, store, key))
        return self._compiled(bound, store, key)

    def _compiled(self, bound: inspect.BoundArguments, store: Cache | None, key: str) -> jax.stages.Compiled:
        with _no_collection():
            lowered = self.jitted.lower(*bound.args, **bound.kwargs)
        compiled = lowered.compile(self._options())
        give_back()  # the compiler leaves hundreds of megabytes
        if store is not None and key and _stands_alone(compiled):
            store.write(key, [pickle.dumps((_devices(compiled), *serialize(compiled)))])
        return compiled


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Switches Python's garbage collection off, which takes two fifths of the time of tracing."""
    if was := gc.isenabled():
        gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _stands_alone(compiled: jax.stages.Compiled) -> bool:
    """Whether another process can run the program as it is.

    Decompositions call LAPACK (on GPU, cuSOLVER) through pointers that JAX sets only when it lowers such a program. A
    process that loads it instead would crash.
    """
    text = compiled.as_text()
    return text is not None and "lapack_" not in text and "cusolver_" not in text


class _Tried:
    """A loaded program whose first results are waited for: if it fails, it is compiled instead."""

    def __init__(self, loaded: Callable[..., Any], compiled: Callable[[], Callable[..., Any]]) -> None:
        self._program, self._compiled, self._works = loaded, compiled, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._works:
            return self._program(*args, **kwargs)
        try:
            out = jax.block_until_ready(self._program(*args, **kwargs))
        except jax.errors.JaxRuntimeError:
            if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves((args, kwargs))):
                raise  # their memory has been used for the results
            self._program = self._compiled()
            out = self._program(*args, **kwargs)
        self._works = True
        return out


def _devices(compiled: jax.stages.Compiled) -> list[int]:
    """Returns the numbers of the devices that a program runs on, in the order of its mesh, if it has one."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    for sharding in shardings:
        if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(sharding.mesh, jax.sharding.Mesh):
            return _numbers(sharding.mesh)
    return sorted({device.id for sharding in shardings for device in sharding.device_set})
