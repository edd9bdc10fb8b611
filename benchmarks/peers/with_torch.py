"""Runs the work of `work.py` in plain torch: one process, or a second one that trains every other client.

    python benchmarks/peers/with_torch.py FOLDER [--processes 2] [--threads 1]
"""

from __future__ import annotations

import argparse
import multiprocessing
import time

import numpy as np
from lora import Arrays, report
from torch_client import Client


def train_share(client: Client, share: range, round_: int, start: Arrays) -> tuple[Arrays, float]:
    """Trains the clients of a share in one round; returns the sums of their LoRAs and of their mean losses."""
    sums, losses = [np.zeros_like(a) for a in start], 0.0
    for number in share:
        client.load(start)
        losses += client.train(number, round_)
        for total, array in zip(sums, client.arrays(), strict=True):
            total += array
    return sums, losses


def serve(pipe, client: Client, share: range) -> None:
    """Runs in the second process: trains its share of every round that the pipe delivers."""
    while (work := pipe.recv()) is not None:
        pipe.send(train_share(client, share, *work))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    client = Client(args.folder, args.threads)
    count, lora = client.settings["clients"], client.start
    pipe, losses = None, []
    if args.processes == 2:
        # A fork has the model without loading it again. No thread has started yet that it would lack.
        context = multiprocessing.get_context("fork")
        pipe, other_end = context.Pipe()
        context.Process(target=serve, args=(other_end, client, range(1, count, 2)), daemon=True).start()
    began = time.perf_counter()
    for round_ in range(client.settings["rounds"]):
        if pipe is not None:
            pipe.send((round_, lora))
        sums, loss = train_share(client, range(0, count, args.processes), round_, lora)
        if pipe is not None:
            others, others_loss = pipe.recv()
            sums, loss = [a + b for a, b in zip(sums, others, strict=True)], loss + others_loss
        lora = [total / count for total in sums]
        losses.append(loss / count)
    seconds = time.perf_counter() - began
    if pipe is not None:
        pipe.send(None)
    report(seconds, client.start, lora, losses)


if __name__ == "__main__":
    main()
