"""Predicts the cost of a round from the population K, the cohort S and the model, with a few measurements.

    python benchmarks/projection.py [--json FILE]

It measures a client step, image features, the Gram matrix of a cohort's uploads, mixing, and reading and writing of the
store. From these it computes each term of a round, up to a million clients and cohorts of thousands. Then it compares
predictions with measurements at sizes that the constants were not fitted on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
FITTED, CHECKED = (128, 512), 1024  # cohort sizes
CLIENTS = 8  # number of clients in the fitted training phase; the check has four times as many


def best(function: Callable[[], object], times: int = 3) -> float:
    """Returns the seconds of the fastest of `times` calls, after a first call that compiles."""
    import jax

    jax.block_until_ready(function())
    took = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(function())
        took.append(time.perf_counter() - began)
    return min(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    import jax
    import numpy as np

    from pilot_jax.config import load_config
    from pilot_jax.data.features import image_features
    from pilot_jax.federation import distances, mixing
    from pilot_jax.federation.roles import num_bytes
    from pilot_jax.parallel.devices import split_cpu
    from pilot_jax.runs import prepare
    from pilot_jax.storage import Store
    from pilot_jax.testing.phases import train_phase

    config = load_config(ROOT / "configs" / "scale_1024.yaml", [
        f"data.digits.clients_per_task={CLIENTS}", "data.digits.scenario=b", "system.store=null"])
    split_cpu(config.system)
    setup = prepare.prepare(config)
    fed = setup.federation
    adapters = prepare.initial_adapters(fed)
    sent, received = (sum(b.values()) for b in fed.strategy.sent_bytes(adapters))
    state, lora = num_bytes(adapters), num_bytes(adapters["text_adapter"]) // 4

    def phase(count: int) -> float:
        """Returns the seconds of one stage-2 phase of `count` clients."""
        everyone = dict.fromkeys(range(count), adapters)
        return best(lambda: train_phase(fed, everyone, 1, "stage2", "stage2", setup.executor)[0][0])

    steps = fed.full_steps(0)
    step = phase(CLIENTS) / (CLIENTS * steps)
    samples = prepare.load_samples(config)[:512]
    feature = best(lambda: image_features(fed.model, samples), 1) / len(samples)

    rng = np.random.default_rng(0)

    def uploads(cohort: int) -> dict:
        return jax.tree.map(lambda leaf: rng.standard_normal((cohort, *leaf.shape), np.float32),
                            adapters["text_adapter"])

    def server(cohort: int) -> tuple[float, float]:
        """Returns the seconds of distances and of mixing."""
        tree = jax.device_put(uploads(cohort))
        weights = jax.numpy.full((cohort, cohort), 1 / cohort)
        mix = jax.jit(mixing.apply)
        neighbors = fed.strategy.params.ata.neighbors
        distances.BY_GRAM = cohort  # of all pairs, an upper bound: larger cohorts use sketches
        return best(lambda: distances.distances(tree, neighbors)), best(lambda: mix(weights, tree))

    # Gram matrix and mixing take 2·S²·P FLOPs each. Reading uploads, and subtracting a few pairs per client, grow as S.
    (small, large), times = FITTED, [server(cohort) for cohort in FITTED]
    curves = []  # (seconds per S², seconds per S)
    for low, high in zip(*times, strict=True):
        square = max((high / large - low / small) / (large - small), 0.0)
        curves.append((square, max(high / large - square * large, 0.0)))
    rates = [2 * lora / square if square else float("inf") for square, _ in curves]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        keys = [store.write(i, adapters) for i in range(64)]
        store.flush()
        for key in keys:
            store.read(key)
        written, read = (64 * state / seconds for seconds in (store.write_seconds, store.read_seconds))

    def terms(cohort: int) -> dict[str, float]:
        """Returns the seconds of each part of a round after the first."""
        distances_, mixing_ = (square * cohort**2 + linear * cohort for square, linear in curves)
        return {"training": cohort * steps * step, "distances": distances_, "mixing": mixing_,
                "disk": cohort * state * (1 / written + 1 / read)}

    gram, mixed = (rate / 1e9 for rate in rates)
    print(f"client step {step * 1e3:.1f} ms, image {feature * 1e3:.2f} ms, Gram {gram:.1f} and mixing {mixed:.1f} "
          f"GFLOP/s, store {written / 1e6:.0f} MB/s written, {read / 1e6:.0f} MB/s read")
    print(f"LoRA {lora} parameters; a client's state {state / 1e6:.2f} MB; {sent / 1e6:.2f} MB up and "
          f"{received / 1e6:.2f} MB down in a phase")
    rows = []
    print(f"{'K':>9} {'S':>6} {'features':>11} {'on disk, GB':>12} {'training':>9} {'distances':>10} "
          f"{'mixing':>8} {'disk':>6} {'MB up+down':>11}")
    per_client = 22 * fed.clients[0].train["features"][0].nbytes  # a client of scale_1024 has 20 + 2 scenes on average
    for population, cohort in ((128, 64), (1024, 64), (10**4, 64), (10**5, 256), (10**6, 256), (10**6, 4096)):
        t = terms(cohort)
        rows.append({"clients": population, "cohort": cohort, "features_s": cohort * 20 * feature,
                     "disk_bytes": population * (state + per_client), "network_bytes": cohort * (sent + received), **t})
        row = rows[-1]
        print(f"{population:>9} {cohort:>6} {row['features_s']:>9.1f} s {row['disk_bytes'] / 1e9:>12.2f} "
              f"{t['training']:>7.1f} s {t['distances']:>8.2f} s {t['mixing']:>6.2f} s {t['disk']:>4.2f} s "
              f"{row['network_bytes'] / 1e6:>11.0f}")
    even = (steps * step - sum(linear for _, linear in curves)) / sum(square for square, _ in curves)
    print(f"ATA costs as much as training at S = {even:.0f}")
    predicted = terms(CHECKED)
    checks = {"training, 4 x the clients": (phase(4 * CLIENTS), 4 * CLIENTS * steps * step)}
    measured = server(CHECKED)
    checks |= {f"distances, S = {CHECKED}": (measured[0], predicted["distances"]),
               f"mixing, S = {CHECKED}": (measured[1], predicted["mixing"])}
    for name, (seen, said) in checks.items():
        print(f"{name}: measured {seen:.2f} s, predicted {said:.2f} s ({seen / said - 1:+.0%})")
    if args.json:
        args.json.write_text(json.dumps({
            "step_s": step, "feature_s": feature, "flops": rates, "store_bytes_per_s": [written, read], "rows": rows,
            "even_cohort": even, "checks": checks}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
