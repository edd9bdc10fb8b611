"""Deployed federations as processes on 127.0.0.1, in the environment that `make build/deploy/.made` makes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from pilot_jax.testing.checkpoints import write_checkpoint

# Flower's API moves between minor versions. What examples/deploy_demo.py and pilot_jax/deploy/ use of it:
USED = """
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
import flwr, inspect
NodeInfo(node_id=1, public_key=b"", last_activated_at="")
assert {"get_nodes", "push_messages", "pull_messages", "send_and_receive"} <= set(dir(Grid))
assert {"dst_node_id", "message_type", "ttl"} <= set(inspect.signature(Message).parameters)
assert hasattr(Message, "has_content")
assert Array("uint8", (3,), "bytes", b"abc").data == b"abc"
from flwr.supercore.task_identity import TaskIdentity
TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # as in a server app
message = Message(RecordDict({"a": ConfigRecord({"names": ["x"]})}), 7, "train.stage1", ttl=5.0)
from flwr.common.config import parse_config_args  # reads --node-config
assert parse_config_args(['client="a\\\\U00000027 = b" state="s"']) == {"client": "a' = b", "state": "s"}
assert message.metadata.dst_node_id == 7 and message.metadata.message_type == "train.stage1"
print(".".join(flwr.__version__.split(".")[:2]))
"""


def python() -> Path:
    """Returns the interpreter with pilot-jax[deploy]; PILOT_JAX_DEPLOY names another than that of the Makefile."""
    found = Path(os.environ.get("PILOT_JAX_DEPLOY", ROOT / "build" / "deploy" / "bin" / "python"))
    assert found.exists(), f"{found} does not exist. Run: make build/deploy/.made"
    return found


def demo(*options: str, minutes: int) -> str:
    done = subprocess.run([python(), ROOT / "examples" / "deploy_demo.py", *options], capture_output=True, text=True,
                          timeout=60 * minutes)
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_flower_is_the_version_that_is_used():
    """If this fails after an update of flwr: read its changelog for the names in USED, adapt pilot_jax/deploy/ and
    examples/network.py (commands and their options), then raise `deploy` in pyproject.toml, FLOWER in deploy/glue.py
    and the version in docs/deployment.md together."""
    done = subprocess.run([python(), "-c", USED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.42"


@pytest.mark.slow
def test_a_network_ends_as_the_simulator():
    """Adapters, mixing matrices, bytes, and nothing private on the wire; the demo checks and prints them."""
    said = demo("--short", minutes=20)
    assert said.count("ok  ") == 9, said


@pytest.mark.long
def test_the_whole_demo():
    """Three strategies for two rounds each; nodes and servers may die, and strangers are refused."""
    said = demo(minutes=60)
    assert said.count("ok  ") == 3 * 9 + 6 and "[code" in said, said


@pytest.mark.long
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_large_adapters_go_there_and_back(wire, tmp_path):
    """A base that is small but for its LoRA of 168 million numbers."""
    write_checkpoint(tmp_path / "base", text=dict(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        head_dim=64))
    said = demo("--large", str(tmp_path / "base"), "--wire", wire, minutes=30)
    assert said.count("ok  ") == 1 and "peak memory: flower-super" in said, said


@pytest.mark.slow
def test_the_command_line_works_beside_flower():
    """Flower brings older versions of typer and rich."""
    for arguments in (["--help"], ["deploy", "--help"], ["roles", str(ROOT / "configs" / "quickstart.yaml")]):
        done = subprocess.run([python(), "-m", "pilot_jax", *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr
