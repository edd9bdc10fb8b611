"""Tests that compiled programs of a mesh move what docs/scaling.md says: weights by layers, no activations."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict

import pytest
from test_mesh import on_devices

COMPILED = """
import json, sys
sys.path.insert(0, "tests")
from conftest import small_config
from pilot_jax.planning import estimate
from pilot_jax.planning.lowering import programs

config = small_config(strategy={"name": "fedavg"}, train={"batch_size": 8}, system={
    "mesh": {"clients": 1, "fsdp": 8, "tensor": 1}, "client_chunk": 1}, model=json.loads(sys.argv[1]))
run = programs(config)
stage = estimate.outline(config).strategy.first_stages[0]
plan = estimate.make_plan(config)
print(json.dumps({"text": run[stage].lower().compile().as_text(), "tokens": plan["longest_sequence"],
                  "planned": plan["bytes_between_devices_per_step"][stage]}))
"""
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "s8": 1, "u8": 1, "pred": 1}
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
LAYERS, DEVICES = 4, 8  # of the embedded base; of the mesh


def shapes(types: str) -> list[tuple[str, tuple[int, ...]]]:
    found = re.findall(r"(\w+)\[([\d,]*)\]", types)
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in found]


def collectives(text: str) -> Counter[tuple[str, str, int]]:
    """Returns how often a step runs each collective, by (kind, types of its results, depth in loops)."""
    parts, name = defaultdict(list), None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = "ENTRY" if head[1] else head[2]
        elif name:
            parts[name].append(line)

    def of(name: str, depth: int) -> Counter[tuple[str, str, int]]:
        found: Counter[tuple[str, str, int]] = Counter()
        for line in parts[name]:
            if moved := re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line):
                found[moved[2], moved[1], depth] += 1
            if " while(" in line:  # the loop over steps has no known count, and counts as one step
                count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                inner = of(re.search(r"body=%?([\w.\-]+)", line)[1], depth + 1)
            elif called := re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                count, inner = None, of(called[1], depth)
            else:
                continue
            for key, times in inner.items():
                found[key] += times * (int(count[1]) if count else 1)
        return found

    return of("ENTRY", 0)


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"remat": True}, pytest.param({"base": "nf4"}, marks=pytest.mark.long)])
def test_fsdp_gathers_weights_layer_by_layer(model):
    """A layer's weights are gathered inside the loops over layers, twice each, as they are stored. No collective there
    moves activations. All bytes of a step are within 20 % of the plan's."""
    out = json.loads(on_devices(DEVICES, COMPILED, json.dumps(model)).splitlines()[-1])
    moved = collectives(out["text"])
    stored = "u8" if model.get("base") else "f32"
    rows = 2 if model.get("base") else 1  # pairs of rows share a byte
    in_layers = [(kind, *shape, count) for (kind, types, depth), count in moved.items() if depth == 2
                 for shape in shapes(types)]
    gathers, tokens = Counter(), out["tokens"]
    for kind, dtype, dims, count in in_layers:
        assert kind in ("all-gather", "all-reduce") and not {tokens, tokens * 8} & set(dims), (kind, dims)
        if kind == "all-gather":
            gathers[dims[1:]] += count * (dtype == stored)
        else:  # gradients of A and B, of one target or of those that read the same input
            assert {4, 8, 12} & set(dims), dims
    for d_in, d_out, linears in ((128, 128, 4), (128, 352, 2), (352, 128, 1)):
        assert gathers[d_in // rows, d_out] == 2 * linears * LAYERS
    received = 0.0
    for (kind, types, _), count in moved.items():
        size = sum(BYTES[dtype] * math.prod(dims) for dtype, dims in shapes(types))
        received += count * size * (2 if kind == "all-reduce" else 1) * (DEVICES - 1) / DEVICES
    assert received == pytest.approx(sum(out["planned"].values()), rel=0.2)
