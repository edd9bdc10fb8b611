"""Compares the client steps per second of Pilot's local phases in this package and in PyTorch.

    python benchmarks/peer.py [--repetitions 5] [--steps 10] [--json FILE]        (or: make bench)

All systems have the same base model, samples, batches, learning rates and losses. Before anything is timed, the losses
of `--steps` steps of every client and stage are compared with those of torch in float64. The run ends if this package's
differ by more than 1e-3, or another system's by more than 1e-2 (torch's own float32 reaches 2e-3 on some processors).
Each system has its own processes (their peak memory is reported) and is idle while the others run. The systems
alternate, and medians over the repetitions are printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pilot_jax.runs.prepare import Setup

ROOT = Path(__file__).parent.parent
STAGES = ("stage1", "stage2")
SYSTEMS = {  # name: (kind, tuned, processes, threads each)
    "pilot_jax": ("jax", False, 1, 0),
    "torch": ("torch", False, 1, 0),
    "torch, 2 processes": ("torch", False, 2, 1),
    "torch tuned": ("torch", True, 1, 0),
    "torch tuned, 2 processes": ("torch", True, 2, 1),
}
EXACT = "torch in float64"
MOST_DIFFERENCE = {"pilot_jax": 1e-3}  # others: 1e-2


def settings(steps: int) -> list[str]:
    return [f"federation.local_steps={steps}", "federation.rounds=1", "data.digits.train=96", "data.digits.test=1",
            "data.digits.validation=1"]


def prepared(steps: int) -> tuple[Setup, dict[str, Any]]:
    """Returns the quickstart's setup with `steps` steps per phase, and the adapters that every client starts with."""
    from pilot_jax.config import load_config
    from pilot_jax.runs import prepare

    setup = prepare.prepare(load_config(ROOT / "configs" / "quickstart.yaml", settings(steps)))
    return setup, prepare.initial_adapters(setup.federation)


class JaxWorker:
    def __init__(self, steps: int, work: str, share: slice, tuned: bool) -> None:
        from pilot_jax.config import SystemConfig
        from pilot_jax.parallel.devices import split_cpu

        split_cpu(SystemConfig())  # as `pilot-jax run` does
        self.setup, self.adapters = prepared(steps)

    def phase(self, stage: str) -> dict[str, tuple[float, float]]:
        """Trains all clients for one phase; returns (mean loss, loss of the last step) by client."""
        from pilot_jax.testing.phases import train_phase

        fed = self.setup.federation
        everyone = dict.fromkeys(range(len(fed.clients)), self.adapters)
        _, records = train_phase(fed, everyone, 1, stage, stage, self.setup.executor)
        return {r["client"]: (r["loss"], r["last_loss"]) for r in records}


class TorchWorker:
    def __init__(self, steps: int, work: str, share: slice, tuned: bool, dtype: str = "float32") -> None:
        import torch

        sys.path.insert(0, str(Path(__file__).parent))
        from torch_peer import TorchPeer

        given = pickle.loads(Path(work).read_bytes())  # safe, since this script has written it
        self.share = list(range(len(given["clients"])))[share]
        self.orders, self.names = given["orders"], [c["name"] for c in given["clients"]]
        self.peer = TorchPeer(given["base"], given["clients"], given["rates"], rank=given["rank"],
                              alpha=given["alpha"], tasks=given["tasks"], batch=given["batch"], tuned=tuned,
                              dtype=getattr(torch, dtype))
        self.peer.load(given["lora"], given["router"])

    def phase(self, stage: str) -> dict[str, tuple[float, float]]:
        self.peer.reset()
        losses = self.peer.phase(stage, {c: self.orders[stage][c] for c in self.share})
        return {self.names[c]: (statistics.fmean(v), v[-1]) for c, v in losses.items()}


def serve(pipe, kind: str, threads: int, steps: int, work: str, share: slice, tuned: bool) -> None:
    """Runs in a system's process: builds its worker, then trains a phase for each stage that the pipe delivers."""
    if kind == "torch":
        import torch

        torch.set_num_threads(threads or os.cpu_count() or 1)
    worker = (JaxWorker if kind == "jax" else TorchWorker)(steps, work, share, tuned)
    pipe.send("ready")
    while (stage := pipe.recv()) is not None:
        losses = worker.phase(stage)
        pipe.send((losses, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def write_work(file: Path, steps: int) -> dict:
    """Writes data, pixels, batches and initial adapters for the torch processes; returns the amount of work."""
    import numpy as np

    from pilot_jax.data.arrays import visiting_order
    from pilot_jax.data.images import pixel_values, read_image
    from pilot_jax.federation.randomness import client_generator
    from pilot_jax.models.checkpoints.peft import peft_tensors
    from pilot_jax.runs.prepare import load_samples

    setup, adapters = prepared(steps)
    fed, train, lora = setup.federation, setup.federation.train, setup.model.lora
    by_client: dict[str, list] = {}
    for sample in load_samples(setup.config):
        if sample.split == "train":
            by_client.setdefault(sample.client, []).append(read_image(sample, setup.config.data.limits))
    clients = [{"name": c.name, "task_index": fed.task_index(i), "pixels": pixel_values(fed.model, by_client[c.name]),
                **{k: v for k, v in c.train.items() if k != "features"}} for i, c in enumerate(fed.clients)]
    orders = {stage: {i: visiting_order(client_generator(fed.seed, c.name, 1, stage), c.size, train.batch_size,
                                        steps)[0] for i, c in enumerate(fed.clients)}
              for stage in STAGES}
    given = {"base": str(fed.model.text_directory), "clients": clients, "orders": orders, "tasks": len(fed.tasks),
             "rates": {"stage1": (train.lr_lora_stage1, train.lr_connector),
                       "stage2": (train.lr_lora_stage2, train.lr_connector)},
             "rank": lora.rank, "alpha": lora.alpha, "batch": train.batch_size,
             "lora": peft_tensors(adapters["text_adapter"], "llava"),
             "router": np.asarray(adapters["router"]["kernel"]).T}
    file.write_bytes(pickle.dumps(given))
    tokens = sum(int(c["attention_mask"][orders[s][i]].sum()) for s in STAGES for i, c in enumerate(clients))
    return {"clients": len(clients), "tokens": tokens, "client_steps": len(STAGES) * len(clients) * steps}


class System:
    def __init__(self, name: str, steps: int, work: str) -> None:
        kind, tuned, processes, threads = SYSTEMS[name]
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for i in range(processes):
            own_end, other_end = context.Pipe()
            share = slice(i, None, processes)
            process = context.Process(target=serve, args=(other_end, kind, threads, steps, work, share, tuned),
                                      daemon=True)
            process.start()
            self.pipes.append(own_end)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()
        self.memory = 0

    def phases(self) -> tuple[float, dict]:
        """Returns the seconds of both stages together, and the losses by stage and client."""
        began, losses = time.perf_counter(), {}
        for stage in STAGES:
            for pipe in self.pipes:
                pipe.send(stage)
            answers = [pipe.recv() for pipe in self.pipes]
            losses[stage] = {name: value for got, _ in answers for name, value in got.items()}
            self.memory = max(self.memory, sum(peak for _, peak in answers))
        return time.perf_counter() - began, losses

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join()


def exact_losses(steps: int, work: str) -> dict[str, dict]:
    """Returns the losses of torch in float64, with which those of all systems are compared."""
    worker = TorchWorker(steps, work, slice(None), tuned=True, dtype="float64")
    return {stage: worker.phase(stage) for stage in STAGES}


def check_losses(losses: dict[str, dict], exact: dict[str, dict]) -> dict[str, float]:
    """Returns every system's largest difference to `exact`; ends the run if one is too large."""
    worst = {}
    for name, theirs in losses.items():
        differences = {(stage, client): max(abs(a - b) for a, b in zip(pair, theirs[stage][client], strict=True))
                       for stage in STAGES for client, pair in exact[stage].items()}
        stage, client = max(differences, key=lambda key: differences[key])
        worst[name] = differences[stage, client]
        if worst[name] > MOST_DIFFERENCE.get(name, 1e-2):
            raise SystemExit(f"{name}, {stage} of {client}: losses {theirs[stage][client]}, {EXACT} "
                             f"{exact[stage][client]}; the systems do not do the same work")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="number of steps per client and phase")
    parser.add_argument("--only", nargs="*", choices=SYSTEMS, default=list(SYSTEMS), help="systems to run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work.pickle"
        # In another process, so that this one stays small and has no threads of either library.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            sizes = pool.apply(write_work, (work, args.steps))
            exact = pool.apply(exact_losses, (args.steps, str(work)))
        systems = {name: System(name, args.steps, str(work)) for name in args.only}
        first = {name: system.phases()[1] for name, system in systems.items()}  # compiles, and warms up
        worst = check_losses(first, exact)
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(args.repetitions):
            for name, system in systems.items():
                seconds[name].append(system.phases()[0])
        for system in systems.values():
            system.close()
    speed = {name: sizes["client_steps"] / statistics.median(s) for name, s in seconds.items()}
    result = {"client_steps_per_second": speed,
              "tokens_per_second": {n: v * sizes["tokens"] / sizes["client_steps"] for n, v in speed.items()},
              "spread": {n: [sizes["client_steps"] / s for s in sorted(v, reverse=True)] for n, v in seconds.items()},
              "peak_memory_bytes": {name: system.memory for name, system in systems.items()},
              "loss_differences": worst, "cpus": os.cpu_count(), "steps": args.steps,
              "repetitions": args.repetitions}
    ours = speed.get("pilot_jax")
    if ours and len(speed) == len(SYSTEMS):
        best = max((n for n in speed if n != "pilot_jax"), key=speed.get)
        result |= {"ratio_torch": ours / speed["torch"], "ratio_torch_tuned": ours / speed["torch tuned"],
                   "ratio_best_torch": ours / speed[best], "best_torch": best}
    for name, value in speed.items():
        print(f"{name:<26} {value:7.1f} client-steps/s {result['tokens_per_second'][name]:9.0f} tokens/s "
              f"{systems[name].memory / 1e9:5.2f} GB, losses within {worst[name]:.1e}")
    for key in ("ratio_torch", "ratio_torch_tuned", "ratio_best_torch"):
        if key in result:
            print(f"{key:<26} {result[key]:7.2f}")
    print(f"losses are compared with {EXACT}; medians of {args.repetitions} repetitions; {os.cpu_count()} CPUs")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
