"""Runs the work of `work.py` in Flower's simulation: its FedAvg, its Ray backend, and the torch client of the peers.

    python benchmarks/peers/with_flower.py FOLDER [--workers 2] [--threads 1]

Each worker is a process of Ray that keeps the model, as a careful user would write it: Flower gives it one client after
another. `run_simulation` is used, since `flwr run` starts a server process of its own, which would take longer.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when flwr is imported
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from lora import first_lora, read_settings, report


@functools.cache
def worker_client(folder: str, threads: int):
    """Returns this process's model, which is loaded once."""
    from torch_client import Client

    return Client(folder, threads)


def client_app(folder: str, threads: int) -> ClientApp:
    """Returns the app of the clients: it trains one client for one round, from the LoRA that it receives."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        import with_flower  # the module of the worker, whose cache lives as long as its process

        client = with_flower.worker_client(folder, threads)
        client.load(message.content["arrays"].to_numpy_ndarrays())
        loss = client.train(int(context.node_config["partition-id"]), message.content["config"]["server-round"] - 1)
        content = RecordDict({
            "arrays": ArrayRecord(client.arrays()),
            "metrics": MetricRecord({"loss": loss, "num-examples": client.settings["samples"]})})
        return Message(content=content, reply_to=message)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each worker")
    args = parser.parse_args()
    folder = str(Path(args.folder).resolve())
    settings, server, done = read_settings(folder), ServerApp(), {}

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        start = first_lora(folder)
        began = time.perf_counter()
        result = FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord(start), settings["rounds"],
                                                     train_config=ConfigRecord({}))
        done.update(seconds=time.perf_counter() - began, first=start, last=result.arrays.to_numpy_ndarrays(),
                    losses=[m["loss"] for _, m in sorted(result.train_metrics_clientapp.items())])

    run_simulation(server, client_app(folder, args.threads), settings["clients"], backend_config={
        "init_args": {"num_cpus": args.workers, "log_to_driver": False}, "client_resources": {"num_cpus": 1}})
    report(done["seconds"], done["first"], done["last"], done["losses"])


if __name__ == "__main__":
    main()
