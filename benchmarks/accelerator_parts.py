"""What benchmarks/accelerator.py measures, in a process of its own: reads cases from stdin, appends results to a file.

    python benchmarks/accelerator_parts.py RESULTS DEADLINE [--toy]

A case is a dict with `part` (a function below) and its settings. Before a case, a line {"started": i} is written, and
after it {"case": i, …} with its numbers, or `status` if there are none. Weights are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from accelerator_torch import Missing, Torch, best_of

ROOT = Path(__file__).parent.parent
STEPS = 4  # a step's time is that of 4 steps less that of one, over three
ALIGN = {"7b": 8192, "toy": 512}  # side of the matrices of which the ceiling is measured


class Jax:
    """Measures this package. The base of the last case stays on the device while cases use the same."""

    def __init__(self, shape: str) -> None:
        import jax

        self.jax, self.shape = jax, shape
        self.base: tuple[str, Any] = ("", None)
        self.device = jax.devices()[0]

    def about(self) -> dict:
        import jaxlib

        stats = self.device.memory_stats() or {}
        return {"device": self.device.device_kind, "backend": self.jax.default_backend(), "jax": self.jax.__version__,
                "jaxlib": jaxlib.__version__, "python": sys.version.split()[0], "bytes_limit": stats.get("bytes_limit"),
                "shape": self.shape}

    def ceiling(self, case: dict) -> dict:
        """Measures a chain of products of random matrices, since equal numbers take less power, and a copy of 1 GB."""
        import jax.numpy as jnp
        import numpy as np

        from pilot_jax.kernels.backend import default_dtype

        jax, size, times = self.jax, ALIGN[self.shape], 8
        dtype = jnp.dtype(case.get("dtype") or default_dtype())

        @jax.jit
        def chain(x):
            return jax.lax.fori_loop(0, times, lambda _, y: (y @ x).astype(dtype), x)

        @jax.jit
        def copied(x):
            return x + 1

        numbers = np.random.default_rng(0).standard_normal((size, size), np.float32)
        x = jnp.asarray(numbers / np.sqrt(size), dtype)  # products of such matrices keep their scale
        chain(x).block_until_ready()
        flops = 2 * size**3 * times / best_of(lambda: chain(x).block_until_ready())
        large = jnp.zeros(2**28 // (1 if self.shape == "7b" else 64), jnp.float32)
        copied(large).block_until_ready()
        moved = 2 * large.nbytes / best_of(lambda: copied(large).block_until_ready())
        return {"flops_per_second": flops, "bytes_per_second": moved, "dtype": dtype.name, "size": size}

    def outline(self, case: dict):
        """Returns (the run's outline, its workload): the shape of LLaVA-1.5-7B, or of the quickstart's base."""
        from pilot_jax.config import load_config
        from pilot_jax.planning import estimate
        from pilot_jax.runs.prepare import outline

        large = self.shape == "7b"
        rank, clients, batch = case.get("rank", 64 if large else 8), case["clients"], case["batch"]
        config = load_config(ROOT / "configs" / ("llava15_7b.yaml" if large else "quickstart.yaml"), [
            f"strategy={{name: {case.get('strategy', 'fedavg')}}}", f"model.lora={{rank: {rank}, alpha: {2 * rank}}}",
            f"train.batch_size={batch}", f"model.remat={str(case.get('remat', False)).lower()}",
            f"model.base={case.get('base', 'bf16')}", f"system.client_chunk={clients}", "system.unroll=1",
            f"system.attention={case.get('attention', 'auto')}",
            *([f"train.microbatch={case['microbatch']}"] if "microbatch" in case else []),
            *(["model.path=llava-1.5-7b-hf"] if large else [])])
        run = outline(config)
        if not large:
            text = dataclasses.replace(run.spec.text, num_layers=2, sliding_layers=run.spec.text.sliding_layers[:2])
            run = dataclasses.replace(run, spec=dataclasses.replace(run.spec, text=text))
        run = dataclasses.replace(run, system=run.system.model_copy(update={"attention": self.attention(run)}))
        length = -(-(run.spec.num_image_tokens + (128 if large else 28)) // 8) * 8
        return run, estimate.Workload((batch * STEPS,) * clients, 3, length, 64 if large else 16)

    def fitting(self, case: dict):
        """Returns (outline, workload, shapes) of a case. Without a setting for `remat`, as few activations are
        recomputed as by plan the device allows."""
        from pilot_jax.planning import estimate

        limit = (self.device.memory_stats() or {}).get("bytes_limit") or float("inf")
        for remat in [case["remat"]] if "remat" in case else [False, "selective", True]:
            run, work = self.outline(case | {"remat": remat})
            shapes = estimate.phase_shapes(run, work)
            planned = estimate.memory(shapes)[run.strategy.first_stages[-1]]["total"]
            if planned < 0.92 * limit:
                break
        return run, work, shapes

    def base_of(self, kind: str, shapes):
        if self.base[0] != kind:
            self.base = ("", None)
            gc.collect()
            self.base = (kind, random_tree(shapes))
        return self.base[1]

    def step(self, case: dict) -> dict:
        """Measures a local step of all clients together, forward, backward and optimizer."""
        import jax.numpy as jnp
        import numpy as np

        from pilot_jax.federation.client import Adapters, ClientBatch, local_update
        from pilot_jax.federation.phases import peak_rates, phase_spec
        from pilot_jax.planning import estimate

        run, work, shapes = self.fitting(case)
        jax, clients, batch = self.jax, case["clients"], case["batch"]
        stage, kernel = run.strategy.first_stages[-1], run.system.attention
        base = self.base_of(case.get("base", "bf16"), shapes.base)
        adapters = random_tree(shapes.adapters)
        spec = phase_spec(shapes.module.clone(kernel=kernel), run.strategy.ownership(), stage, run.train)
        received = spec.received
        own, rest = Adapters({n: jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], clients, 0), t)
                              for n, t in adapters.items() if n not in received},
                             {n: adapters[n] for n in received}).divided(received)
        rows = batch * STEPS
        data = jax.device_put(random_data(run.spec, work, rows, clients, shapes.module.dtype))
        order = np.arange(rows, dtype=np.int32).reshape(1, STEPS, -1).repeat(clients, 0)
        peaks = {n: np.full(clients, rate, np.float32) for n, rate in peak_rates(run.train, stage).items()}

        def of(count: int) -> ClientBatch:
            return ClientBatch(data, order, np.ones(order.shape, np.float32), np.full(clients, count, np.int32),
                               np.zeros(clients, np.int32), peaks)

        began = time.perf_counter()
        program = local_update.jitted.lower(spec, base, own, rest, of(1), mesh=None).compile()
        compile_seconds = time.perf_counter() - began

        def take(count: int) -> None:
            nonlocal own
            own, metrics = program(base, own, rest, of(count))  # uses up `own`
            jax.block_until_ready(metrics)

        take(1)
        one, several = best_of(lambda: take(1)), best_of(lambda: take(STEPS))
        seconds = (several - one) / (STEPS - 1)
        # FLOPs are those of the package's own attention for both, since cuDNN's are not in the jaxpr, and without those
        # of recomputation.
        stored = dataclasses.replace(shapes, module=shapes.module.clone(remat=False))
        flops, used = clients * estimate.step_flops(stored, stage), program.memory_analysis()
        tokens = clients * batch * work.length
        return {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds, "tokens": tokens,
                "flops_per_second": flops / seconds, "attention": kernel, "remat": run.model.recomputes,
                "compiled_bytes": used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
                - used.alias_size_in_bytes, "planned_bytes": estimate.memory(shapes)[stage]["total"],
                "peak_bytes": (self.device.memory_stats() or {}).get("peak_bytes_in_use"),
                "compile_seconds": compile_seconds}

    def attention(self, run) -> str:
        """Returns the attention that a run asks for, or by default the fastest that the device has."""
        from pilot_jax.kernels.attention import cudnn_obstacle
        from pilot_jax.kernels.backend import default_dtype

        wanted, text = run.system.attention, run.spec.text
        obstacle = cudnn_obstacle(self.jax.default_backend(), text.head_dim, text.layers_see_alike, default_dtype())
        if wanted == "cudnn" and obstacle is not None:
            raise Missing(f"cuDNN's attention {obstacle}")
        return ("own" if obstacle is not None else "cudnn") if wanted == "auto" else wanted

    def aggregation(self, case: dict) -> dict:
        """Measures ATA of LoRAs on the device: distances by a Gram matrix and by sketches, and mixing."""
        import jax.numpy as jnp
        import numpy as np

        from pilot_jax.federation import mixing, shortlist
        from pilot_jax.federation.distances import distances
        from pilot_jax.planning import estimate

        jax, cohort = self.jax, case["clients"]
        run, work = self.outline(case | {"batch": 1})
        one = estimate.phase_shapes(run, work).adapters["text_adapter"]
        uploads = random_tree(jax.tree.map(lambda x: jax.ShapeDtypeStruct((cohort, *x.shape), x.dtype), one))
        weights = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(cohort), cohort), jnp.float32)
        mix, size = jax.jit(mixing.apply), sum(x.nbytes for x in jax.tree.leaves(uploads))

        def timed(run) -> float:
            jax.block_until_ready(run())
            return best_of(lambda: jax.block_until_ready(run()))

        found = {"distances_s": timed(lambda: distances(uploads, 2)), "mixing_s": timed(lambda: mix(weights, uploads)),
                 "bytes": size, "peak_bytes": (self.device.memory_stats() or {}).get("peak_bytes_in_use")}
        if shortlist.can_shortlist(uploads, 2):
            found["sketched_s"] = timed(lambda: shortlist.nearest(uploads, 2))
        return found | {"bytes_per_second": size / found["distances_s"]}


def random_tree(shapes):
    """Returns arrays of the given shapes on the device that repeat some random numbers; weights of norms are 1. They
    are made by NumPy, so that no time is spent on compiling."""
    import jax
    import numpy as np

    pool = np.random.default_rng(0).standard_normal(10_007).astype(np.float32)

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        if "norm" in name or name.endswith("['scale']"):
            values = np.full(x.shape, 1 if "norm" in name else 2e-4, x.dtype)
        else:
            numbers = np.minimum(40 * abs(pool), 127) if x.dtype.kind in "iu" else 0.02 * pool
            values = np.resize(numbers.astype(x.dtype), x.shape)
        return jax.device_put(values)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def random_data(model, work, rows: int, clients: int, dtype) -> dict:
    """Returns random training arrays [clients, rows, …] with one image per sample."""
    import numpy as np

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
            "features": np.resize(rng.standard_normal(10_007), features).astype(dtype)}


def measured(worker, case: dict) -> dict:
    """Returns a case's numbers, or a `status` that says why there are none."""
    try:
        return getattr(worker, case["part"])(case)
    except Missing as missing:
        return {"status": f"not measured: {missing}"}
    except Exception as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
            return {"status": f"out of memory: {text[:200]}"}
        if type(error).__name__ == "InputError" or isinstance(error, ImportError):
            return {"status": f"not measured: {text[:300]}"}
        return {"status": f"failed: {type(error).__name__}: {text[:300]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("deadline", type=float, help="seconds since 1970")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    cases, longest = json.load(sys.stdin), 0.0
    shape = "toy" if args.toy else "7b"
    worker: Jax | Torch = Torch(shape) if cases[0][1]["part"] == "torch_step" else Jax(shape)
    with args.results.open("a", encoding="utf-8") as file:
        def write(line: dict) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        write({"about": worker.about()})
        for number, case in cases:
            left = args.deadline - time.time()
            if left < longest:
                write({"case": number, "status": f"skipped: {left:.0f} s were left, and a case takes up to "
                                                 f"{longest:.0f} s"})
                continue
            write({"started": number})
            began = time.perf_counter()
            out = measured(worker, case)
            gc.collect()
            took = time.perf_counter() - began
            longest = max(longest, took)
            write({"case": number, "took_seconds": took, **out})


if __name__ == "__main__":
    main()
