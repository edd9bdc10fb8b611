"""Measures local steps of both stages at LLaVA-1.5-7B's shape against the device's speed of matrix products.

    python benchmarks/accelerator.py [--shape 7b] [--clients 1 2 4 8 16] [--batch 8] [--length 704] [--remat]
                                     [--layers N] [--steps 4] [--attention own cudnn] [--json FILE]

Weights are random, in bfloat16. "of ceiling" is the speed of the step's matrix products (FLOPs from its jaxpr, without
recomputation, over its time) divided by that of a large matrix product in the same dtype on the same device. "peak GB"
is the allocator's peak, and "plan GB" the estimate of `pilot-jax plan`. The peak is that of the process so far, so that
comparing the memory of two attentions needs two runs. Without an accelerator the default is a toy shape, and memory is
not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parent.parent
PHASES = ("stage1", "stage2")


def ceiling(dtype, size: int) -> float:
    """Returns the FLOP/s of size × size matrix products, each of which needs the previous one; the best of three."""
    times = 8

    @jax.jit
    def chain(x):
        return jax.lax.fori_loop(0, times, lambda _, y: (y @ x * (1 / size)).astype(dtype), x)

    x = jnp.ones((size, size), dtype)
    chain(x).block_until_ready()
    best = np.inf
    for _ in range(3):
        began = time.perf_counter()
        chain(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 * times / best


def random_base(shapes):
    """Returns random weights of the given shapes, created on the device leaf by leaf; weights of norms are 1."""
    paths, tree = jax.tree_util.tree_flatten_with_path(shapes)
    make = jax.jit(lambda key, shape, dtype: (0.02 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype),
                   static_argnums=(1, 2))
    leaves = [jnp.ones(leaf.shape, leaf.dtype) if "norm" in str(path[-1]) else
              make(jax.random.key(i), leaf.shape, leaf.dtype) for i, (path, leaf) in enumerate(paths)]
    return jax.tree_util.tree_unflatten(tree, leaves)


def random_data(model, work, rows: int, clients: int, dtype) -> dict:
    """Returns random training arrays [clients, rows, …] with one image per sample."""
    rng, n_image = np.random.default_rng(0), model.num_image_tokens
    ids = rng.integers(10, min(1000, model.text.vocab_size), (clients, rows, work.length))
    ids[..., 4:4 + n_image] = model.image_token_id
    positions = np.arange(work.length - work.answers - 1, work.length - 1)
    positions = np.broadcast_to(positions, (clients, rows, work.answers))
    features = (clients, rows, n_image, model.vision.feature_size)
    return {"input_ids": ids.astype(np.int32), "attention_mask": np.ones(ids.shape, np.int32),
            "target_positions": positions.astype(np.int32),
            "target_ids": np.take_along_axis(ids, positions + 1, axis=-1).astype(np.int32),
            "target_weights": np.ones(positions.shape, np.float32), "has_image": np.ones((clients, rows), np.float32),
            "features": jax.random.normal(jax.random.key(1), features, dtype)}


def seconds_per_step(spec, base, adapters: dict, data: dict, rates: dict[str, float], steps: int) -> float:
    """Returns the seconds of one step of all clients together, without the fixed cost of a call.

    It is the difference between `steps` steps and one step, divided by `steps` − 1."""
    from pilot_jax.federation.client import Adapters, ClientBatch, local_update

    clients, rows = data["has_image"].shape
    order = np.arange(rows, dtype=np.int32).reshape(1, steps, -1).repeat(clients, 0)
    stacked = Adapters({n: jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], clients, 0), t)
                        for n, t in adapters.items() if n not in spec.received},
                       {n: adapters[n] for n in spec.received})
    peaks = {n: np.full(clients, rate, np.float32) for n, rate in rates.items()}

    def run(count: int) -> float:
        began = time.perf_counter()
        batch = ClientBatch(data, order, np.ones(order.shape, np.float32), np.full(clients, count, np.int32),
                            np.zeros(clients, np.int32), peaks)
        jax.block_until_ready(local_update(spec, base, stacked, batch))
        return time.perf_counter() - began

    run(1)  # compiles
    return min(run(steps) - run(1) for _ in range(3)) / (steps - 1)


def main() -> None:
    accelerated = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("7b", "toy"), default="7b" if accelerated else "toy")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 2, 4, 8, 16] if accelerated else [1, 2])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, help="tokens per sample (default: image tokens + 128, toy: + 28)")
    parser.add_argument("--layers", type=int, help="number of decoder layers, if fewer than the model's")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--attention", nargs="*", choices=("own", "cudnn"), default=["own"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from pilot_jax.config import load_config
    from pilot_jax.federation.phases import peak_rates, phase_spec
    from pilot_jax.planning import estimate
    from pilot_jax.runs.prepare import outline

    if "cudnn" in args.attention and not accelerated:
        raise SystemExit("--attention cudnn needs an NVIDIA GPU")
    large = args.shape == "7b"
    overrides = [f"train.batch_size={args.batch}", f"model.remat={str(args.remat).lower()}"]
    config = load_config(ROOT / "configs" / ("llava15_7b.yaml" if large else "quickstart.yaml"), overrides + (
        ["model.path=llava-1.5-7b-hf"] if large else []))
    run = outline(config)
    model = run.spec
    if args.layers:
        model = dataclasses.replace(model, text=dataclasses.replace(
            model.text, num_layers=args.layers, sliding_layers=model.text.sliding_layers[:args.layers]))
    length = args.length or -(-(model.num_image_tokens + (128 if large else 28)) // 8) * 8
    rows = args.batch * args.steps
    device, dtype = jax.devices()[0], None
    rows_out = []
    for clients in args.clients:
        run = dataclasses.replace(run, spec=model, system=run.system.model_copy(update={"client_chunk": clients}))
        work = estimate.Workload((rows,) * clients, 3, length, 64 if large else 16)
        shapes = estimate.phase_shapes(run, work)
        if dtype is None:
            dtype = shapes.module.dtype
            base, top = random_base(shapes.base), ceiling(dtype, 8192 if accelerated else 1024)
            print(f"{device.device_kind}, {jnp.dtype(dtype).name}, {args.shape}, {model.text.num_layers} layers, L "
                  f"{length}, batch {args.batch}, remat {args.remat}; products of {8192 if accelerated else 1024}³ "
                  f"reach {top / 1e12:.2f} TFLOP/s")
            print(f"{'stage':<7} {'attention':<9} {'clients':>7} {'ms a step':>10} {'client-steps/s':>14} "
                  f"{'TFLOP/s':>8} {'of ceiling':>10} {'peak GB':>8} {'plan GB':>8}")
        planned = estimate.memory(shapes)
        data = jax.device_put(random_data(model, work, rows, clients, dtype))
        adapters = run.strategy.initial_adapters(jax.random.key(0), base["projector"], model, run.model.lora.rank, 3)
        for stage, kernel in itertools.product(PHASES, args.attention):
            # FLOPs are those of the package's own attention for both, since cuDNN's are not in the jaxpr.
            flops, total = clients * estimate.step_flops(shapes, stage), planned[stage]["total"]
            spec = phase_spec(shapes.module.clone(kernel=kernel), run.strategy.roles(), stage, run.train)
            try:
                per_step = seconds_per_step(spec, base, adapters, data, peak_rates(run.train, stage), args.steps)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                print(f"{stage:<7} {kernel:<9} {clients:>7} out of memory; plan: {total / 1e9:.1f} GB", flush=True)
                continue
            peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
            rows_out.append({"stage": stage, "attention": kernel, "clients": clients, "seconds_per_step": per_step,
                             "peak_bytes": peak, "planned_bytes": total, "flops_per_second": flops / per_step,
                             "of_ceiling": flops / per_step / top})
            print(f"{stage:<7} {kernel:<9} {clients:>7} {1e3 * per_step:>10.1f} {clients / per_step:>14.2f} "
                  f"{flops / per_step / 1e12:>8.2f} {flops / per_step / top:>10.1%} "
                  f"{'-' if peak is None else f'{peak / 1e9:.1f}':>8} {total / 1e9:>8.1f}", flush=True)
    if args.json:
        out = {"device": device.device_kind, "ceiling_flops": top, "rows": rows_out}
        args.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
