"""Runs the work of `work.py` in Apple's pfl-research: its FederatedAveraging, its local SGD loop, its torch model.

    python benchmarks/peers/with_pfl.py FOLDER [--processes 2] [--threads 1]

With two processes, each trains every other client, and pfl reduces their statistics through torch.distributed, as
under `torchrun`; the first process starts the second itself, which is faster than a launcher.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time


def start_second(arguments: list[str]) -> subprocess.Popen:
    """Starts the second process and makes this one the first, by the environment that `torchrun` would give them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "peers", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port)}
    second = subprocess.Popen([sys.executable, __file__, *arguments],
                              env=os.environ | shared | {"RANK": "1", "LOCAL_RANK": "1"})
    os.environ.update(shared | {"RANK": "0", "LOCAL_RANK": "0"})
    return second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each process")
    args = parser.parse_args()
    second = None
    if args.processes == 2 and "RANK" not in os.environ:
        second = start_second(sys.argv[1:])
    train(args.folder, args.threads)
    if second is not None and second.wait():
        raise SystemExit("the second process failed")


def train(folder: str, threads: int) -> None:
    """Trains all rounds; the first process prints the results."""
    # Imported here, since pfl reads the environment that makes processes a group when it is imported.
    import torch
    from lora import report
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDatasetBase
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.internal.ops import pytorch_ops
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel
    from torch_client import Client

    client, group = Client(folder, threads), pytorch_ops.distributed
    settings = client.settings

    class Everyone(FederatedDatasetBase):
        """All clients in every round, each with its samples in that round's order; a process has its share of them."""

        def __init__(self) -> None:
            super().__init__()
            self.round = -1

        def __next__(self):
            raise NotImplementedError  # only whole cohorts are used

        def get_cohort(self, cohort_size: int):
            self.round += 1
            for number in range(group.global_rank, cohort_size, group.world_size):
                rows = torch.from_numpy(client.data["orders"][self.round, number].ravel()).long()
                yield PyTorchTensorDataset([x[rows] for x in client.inputs(number)], user_id=str(number)), 0

    class Module(torch.nn.Module):
        """The loss of the client as pfl wants it."""

        def __init__(self) -> None:
            super().__init__()
            self.llava, self.losses = client.llava, []

        def loss(self, embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            loss = client.loss(embeddings, targets)
            self.losses.append(loss.detach().clone())  # pfl divides the loss in place
            return loss

        def metrics(self, *batch, **options):
            return {"nothing": Weighted(0.0, 1)}  # pfl always evaluates before round 1, and we do not

    class Losses(TrainingProcessCallback):
        """Takes note of each round's mean loss."""

        by_round: list[float] = []  # noqa: RUF012 - there is one run

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            total, count = group.all_reduce([torch.stack(module.losses).sum(), torch.tensor(float(len(module.losses)))])
            self.by_round.append(float(total / count))
            module.losses.clear()
            return False, Metrics()

    def local_optimizer(parameters, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(client.parameters, lr=lr, weight_decay=settings["weight_decay"], fused=True)

    module, losses = Module(), Losses()
    model = PyTorchModel(module, local_optimizer, torch.optim.SGD(client.parameters, lr=1.0))
    backend = SimulatedBackend(training_data=Everyone(), val_data=None)
    began = time.perf_counter()
    FederatedAveraging().run(
        NNAlgorithmParams(central_num_iterations=settings["rounds"], evaluation_frequency=settings["rounds"] + 1,
                          train_cohort_size=settings["clients"], val_cohort_size=0),
        backend, model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=settings["rate"],
                           local_batch_size=settings["batch"]),
        callbacks=[losses], send_metrics_to_platform=False)
    if group.global_rank == 0:
        report(time.perf_counter() - began, client.start, client.arrays(), losses.by_round)


if __name__ == "__main__":
    main()
