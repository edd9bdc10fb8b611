"""Three clients on a network of this machine, beside the simulator: checks what docs/deployment.md says, and prints it.

    python examples/deploy_demo.py [--short] [--strategies pilot fedavg scaffold] [--folder DIR]

It needs an environment with pilot-jax[deploy] (`make deploy-demo` makes one). Each check is a line that begins with
"ok" or "WRONG"; the exit code is 1 if one is wrong. Three networks run at a time, because each mostly waits. With
--short, Pilot alone is run for one round; nobody is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from network import Network, make_key

import pilot_jax
from pilot_jax.config import load_config
from pilot_jax.data.roster import Roster
from pilot_jax.deploy.glue import write_app
from pilot_jax.federation.state import Federation
from pilot_jax.runs.prepare import prepare
from pilot_jax.runs.roster import roster_here
from pilot_jax.storage import read_tree
from pilot_jax.words import counted

CLIENTS = {"anna": ("count", 5), "bert": ("count", 7), "cleo": ("colour", 4)}  # task, number of samples
CANARY = "zebra quartz"  # a word of every question, which no message may have
WAIT = 900.0  # seconds; a phase takes a quarter of a minute on an idle machine
wrong: list[str] = []


def check(fine: bool, text: str) -> None:
    wrong.extend([] if fine else [text])
    print(f"{'ok   ' if fine else 'WRONG'} {text}", flush=True)


def make_data(folder: Path) -> None:
    """Writes each client's data into a folder of its own, and those of all for the simulator; lengths differ too."""
    rng, every = np.random.default_rng(5), []
    for name, (task, size) in CLIENTS.items():
        (folder / name).mkdir(parents=True)
        question, own = "How many " + "quite " * 9 * (name == "cleo") + CANARY, []
        for k in range(size):
            file = f"{name}{k}.png"
            Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(folder / name / file)
            own.append({"id": f"{name}-{k}", "image": file, "client": name, "task": task, "split": "train",
                        "conversations": [{"from": "human", "value": f"<image>\n{question}?"},
                                          {"from": "gpt", "value": ["one", "two", "six", "ten", "red"][k % 5]}]})
        (folder / name / "data.json").write_text(json.dumps(own))
        every += [{**sample, "image": f"{name}/{sample['image']}"} for sample in own]
    (folder / "data.json").write_text(json.dumps(every))


def make_config(folder: Path, strategy: str, rounds: int, name: str = "", **sections: Any) -> Path:
    raw = {"model": {"path": "embedded", "lora": {"rank": 4, "alpha": 8}},
           "data": {"path": str(folder / "data" / "data.json"), "template": "vicuna_short"},
           "federation": {"rounds": rounds, "local_steps": 2},
           "strategy": {"name": strategy, **({"ata": {"neighbors": 1}} if strategy == "pilot" else {})},
           "train": {"batch_size": 4}, "system": {"client_chunk": 1, "unroll": 1, "length_spread": 4.0}, **sections}
    path = folder / f"{name or strategy}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def final_adapters(net: Network, client: str) -> dict[str, Any]:
    file, = (net.folder / "nodes" / client).glob("*/final.safetensors")
    return read_tree(file)[0]


def largest(one: Any, other: Any) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.max(np.abs(np.asarray(a) - b))), one, other)))


def in_the_simulator(folder: Path, strategy: str, rounds: int) -> tuple[Any, Federation]:
    """Writes the app of a strategy, and returns what the simulator makes of the same config, with its federation."""
    file = make_config(folder, strategy, rounds)
    config = load_config(file)
    write_app(folder / f"app-{strategy}", config, roster_here(config))
    return pilot_jax.simulate(file, out=folder / f"simulated-{strategy}"), prepare(config).federation


def as_in_the_simulator(folder: Path, strategy: str, simulated: Any, fed: Federation) -> None:
    """Checks a run on a network against the simulator's, and what was on the wire, which has no TLS here."""
    began = time.monotonic()
    with Network(folder / f"net-{strategy}", folder / f"app-{strategy}", wire=True) as net:
        net.start_server()
        for client in CLIENTS:
            net.start_node(client, folder / "data" / client / "data.json")
        status = net.wait(net.run(timeout=WAIT), WAIT * 4)
        assert net.wire is not None
        up, down = net.wire.objects()
        everything = b"".join(bytes(part) for pair in net.wire.connections for part in pair)
        sent = b"".join(bytes(sent) for sent, _ in net.wire.connections)
        own = {client: final_adapters(net, client) for client in CLIENTS}
        kept = [read_tree(file) for file in sorted((net.folder / "nodes").glob("*/*/0*.safetensors"))]
    rounds = counted(simulated.summary["rounds"], "round")
    check(status == "finished:completed",
          f"{strategy}: {rounds} on the network in {time.monotonic() - began:.0f} s: {status}")
    apart = max(largest(own[name], client.adapters)
                for name, client in zip(sorted(CLIENTS), simulated.population, strict=True))
    check(apart <= 1e-5, f"{strategy}: adapters differ from the simulator's by at most {apart:.1e}")
    files = sorted((folder / f"simulated-{strategy}" / "mixing").glob("*.npz"))
    apart = max(np.max(np.abs(np.load(file)["weights"] - np.load(net.folder / "run" / "mixing" / file.name)["weights"]))
                for file in files)
    check(apart <= 1e-6, f"{strategy}: {len(files)} mixing matrices differ by at most {apart:.1e}")
    summary = simulated.summary
    for name, bodies, key in (("up", up, "bytes_up"), ("down", down, "bytes_down")):
        size, told = sum(map(len, bodies)), summary[key]
        check(abs(size / told - 1) < 0.03, f"{strategy}: {size:,} bytes {name} on the wire, {told:,} in the simulator "
                                           f"({size / told - 1:+.1%}); {len(everything):,} in all, polling included")
    nothing_private(strategy, everything, sent, own, kept, fed, list((folder / "data").glob("*/*.png")))


def pieces(tree: Any, rng: np.random.Generator) -> list[bytes]:
    """Returns 16 bytes, four numbers, of 20 random places of each leaf where none of the four is 0."""
    out = []
    for leaf in jax.tree.leaves(tree):
        flat = np.asarray(leaf).ravel()
        starts = rng.integers(0, max(1, len(flat) - 4), 20)
        out += [flat[s:s + 4].tobytes() for s in starts if len(flat) >= 4 and np.all(flat[s:s + 4] != 0)]
    return out


def nothing_private(strategy: str, everything: bytes, sent: bytes, own: dict, kept: list, fed: Federation,
                    pictures: list[Path]) -> None:
    """Checks that nothing that belongs to a client alone was on the wire, and that the same search finds uploads."""
    rng, roles = np.random.default_rng(0), fed.strategy.ownership()
    local = [piece for tree in (*own.values(), *(tree for tree, _ in kept))
             for piece in pieces(roles.select(tree, "local"), rng)]
    shared = [piece for tree, _ in kept for piece in pieces(roles.select(tree, "shared"), rng)]
    found = sum(piece in sent for piece in shared)
    check(found > len(shared) / 2, f"{strategy}: {found} of {len(shared)} pieces of uploads are found on the wire")
    found = sum(piece in everything for piece in local)
    check(found == 0, f"{strategy}: {found} of {len(local)} pieces of local subtrees")
    names = [name for name in roles.names(scope="local") if name != "client"]
    told = {name for name in roles.names() if name != "client"
            and re.search(rb"(?<!\w)%s(?!\w)" % name.encode(), sent)}
    check(told >= set(roles.names(scope="shared")) and not told & set(names),
          f"{strategy}: names of {', '.join(sorted(told))}, none of {', '.join(names) or 'a local subtree'}")
    data = [CANARY.encode()]
    for client in fed.clients:
        ids = np.asarray(client.train["input_ids"])
        data += [ids[0, 2:8].astype(kind).tobytes() for kind in (np.int32, np.int64, np.uint16)]
        data += pieces(np.asarray(client.train["features"])[:1].astype(np.float32), rng)
    for file in pictures:
        row = np.asarray(Image.open(file))[7].tobytes()
        data += [row[:16], file.read_bytes()[60:92]]
    found = sum(piece in everything for piece in data)
    check(found == 0, f"{strategy}: {found} of {len(data)} pieces of texts, tokens, pictures and their features")


def wait_until(net: Network, what: str, true: Callable[[], bool], seconds: float = WAIT) -> None:
    end = time.monotonic() + seconds
    while not true():
        net.revive()
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.3)


def phases(net: Network) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl that are about phases."""
    file = net.folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if "bytes_up" in line]


def secure_network(folder: Path) -> Network:
    """Returns a network with TLS and authenticated nodes, with keys in the roster of its app."""
    config = load_config(make_config(folder, "pilot", 3, "secure"))
    net = Network(folder / "net-secure", folder / "app-secure", secure=True, wire=True)
    keys = {name: make_key(net.folder, name) for name in (*CLIENTS, "stranger")}
    members = roster_here(config).members
    write_app(net.app, config, Roster({n: dataclasses.replace(m, key=keys[n]) for n, m in members.items()}))
    return net


def killed_and_strangers(folder: Path, net: Network) -> None:
    """Strangers are refused; the server and then a node are killed, and the run goes on without and with them."""
    with net:
        net.start_server()
        for client in CLIENTS:
            net.register(client)
            net.start_node(client, folder / "data" / client / "data.json")
        for key, why in (("stranger", "a key that is not registered"), ("", "no key")):
            net.start_node("stranger", key=key)
            check(net.processes["stranger"].wait(120) != 0, f"TLS: a node with {why} is refused: " + next(
                line for line in (net.folder / "stranger.log").read_text().splitlines()[::-1] if "[code" in line))
        del net.processes["stranger"]
        net.run(timeout=WAIT)
        saved = net.folder / "run" / "checkpoints" / "resume" / "000002" / "manifest.json"
        wait_until(net, "round 1 is saved", saved.exists)
        net.kill("server")
        net.start_server()
        timeout = max(60.0, 3 * phases(net)[-1]["seconds"])
        run = net.run(timeout=timeout)
        wait_until(net, "bert is in round 2", lambda: f"[RUN {run}]" in (net.folder / "bert.log").read_text())
        bert, = (net.folder / "nodes" / "bert").glob("*")
        before = read_tree(bert / "000002.safetensors")[0]
        net.kill("bert")
        began = time.monotonic()
        wait_until(net, "round 2 ends", lambda: len(phases(net)) == 3)
        check(phases(net)[2]["quarantined"] == ["bert"],
              f"SIGKILL of bert in round 2, which ended without it {time.monotonic() - began:.0f} s later; "
              f"timeout = {timeout:.0f}")
        net.start_node("bert", folder / "data" / "bert" / "data.json")
        status, done = net.wait(run, WAIT * 2), phases(net)
        check(status == "finished:completed" and [p["clients"] for p in done] == [3, 3, 2, 3],
              f"SIGKILL of the server after round 1: the next run went on with round 2; clients in each phase: "
              f"{[p['clients'] for p in done]}")
        apart = largest(final_adapters(net, "bert")["client"], before["client"])
        check(apart == 0, f"bert came back with its own \u03c8_s (difference {apart:g})")
        assert net.wire is not None
        stream = b"".join(bytes(part) for pair in net.wire.connections for part in pair)
        check(b"POST /" not in stream, f"TLS: {len(stream):,} bytes on the wire, no HTTP in plain text")


def peaks(net: Network, into: dict[str, float]) -> None:
    """Keeps the peak memory, in GB, of each kind of the network's processes, for ever."""
    while True:
        for process in net.tree():
            with contextlib.suppress(OSError, StopIteration):
                words = (process / "cmdline").read_bytes().split(b"\0")
                kind = next(Path(w.decode()).name for w in words[:2] if b"flwr-" in w or b"flower-" in w)
                peak = int((process / "status").read_text().partition("VmHWM:")[2].split()[0]) / 1e6
                into[kind] = max(into.get(kind, 0.0), peak)
        time.sleep(1)


def large(folder: Path, base: Path, wire: str, database: str | None) -> None:
    """One client's LoRA of rank 4,096 on a checkpoint there and back, and the peak memory of each process."""
    config = load_config(make_config(
        folder, "fedavg", 1, model={"path": str(base.absolute()), "lora": {"rank": 4096, "alpha": 4096}},
        train={"batch_size": 1, "optimizer": "sgd"},
        federation={"rounds": 1, "local_steps": 1, "schedule": "single"}))
    everyone, memory = roster_here(config), dict[str, float]()
    net = Network(folder / "net-large", folder / "app-large", database=database)
    write_app(net.app, config, Roster({"anna": everyone.members["anna"]}))
    threading.Thread(target=peaks, args=(net, memory), daemon=True).start()
    began = time.monotonic()
    with net:
        net.start_server()
        net.start_node("anna", folder / "data" / "anna" / "data.json")
        status = net.wait(net.run(timeout=WAIT, wire=wire), WAIT)
        count = sum(leaf.size for leaf in jax.tree.leaves(final_adapters(net, "anna")))
        check(status == "finished:completed" and count > 150e6,
              f"{count:,} numbers as {wire} there and back in {time.monotonic() - began:.0f} s: {status}")
        print(f"      SuperLink's database: {database or 'in memory'}; peak memory: " + ", ".join(
            f"{kind} {gb:.1f} GB" for kind, gb in sorted(memory.items())))


def stop(*_: object) -> None:
    """Ends all networks' processes and the demo."""
    Network.stopped.set()
    sys.exit("stopped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="Pilot alone, one round, nobody is killed")
    parser.add_argument("--strategies", nargs="*", default=["pilot", "fedavg", "scaffold"])
    parser.add_argument("--only-killed", action="store_true", help="no comparison with the simulator")
    parser.add_argument("--only-simulated", action="store_true", help="the comparison alone; nobody is killed")
    parser.add_argument("--large", type=Path, metavar="BASE", help="instead, large adapters of a checkpoint, which "
                        "has 39,000 numbers or more in LoRA of rank 1; see docs/deployment.md")
    parser.add_argument("--wire", default="float32", help="with --large: float32 or bfloat16")
    parser.add_argument("--database", default="superlink.db", help="with --large: SuperLink's; memory: none on disk")
    parser.add_argument("--folder", type=Path, help="new folder for all files (default: a temporary one)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="deploy-demo-") as temporary:
        folder, began = (options.folder or Path(temporary)).absolute(), time.monotonic()
        make_data(folder / "data")
        if options.large is not None:
            large(folder, options.large, options.wire, None if options.database == "memory" else options.database)
        compared = ["pilot"] if options.short else options.strategies
        with ThreadPoolExecutor(3) as pool:
            # Pilot's simulation comes first: it compiles the programs of all nodes of two networks.
            running, rounds = [], 1 if options.short else 2
            compared = [] if options.only_killed or options.large else compared
            for strategy in compared:
                simulated = in_the_simulator(folder, strategy, rounds)
                running.append(pool.submit(as_in_the_simulator, folder, strategy, *simulated))
                if strategy == compared[0] and not (options.short or options.only_simulated):
                    running.append(pool.submit(killed_and_strangers, folder, secure_network(folder)))
            if options.only_killed:
                running.append(pool.submit(killed_and_strangers, folder, secure_network(folder)))
            for future in running:
                future.result()
        print(f"{time.monotonic() - began:.0f} s; {f'{len(wrong)} checks are WRONG' if wrong else 'all is well'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
