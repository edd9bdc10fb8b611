"""Tests of uploads to the Hugging Face Hub, against a stand-in on this machine that speaks its HTTP interface."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from pilot_jax.errors import InputError
from pilot_jax.runs.hub import check_can_push, push


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does when all files are small enough to stand in the commit itself."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.calls.append((self.path, self.headers.get("authorization"), body))
        if self.server.refusal:
            self.answer(self.server.refusal, {"error": "You have no rights here"})
        elif self.path == "/api/repos/create":
            url = f"http://127.0.0.1:{self.server.server_port}/me/model"
            self.answer(200, {"url": url, "id": "1", "name": "me/model"})
        elif self.path.endswith("/preupload/main"):
            self.answer(200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                        for file in json.loads(body)["files"]]})
        elif self.path.endswith("/commit/main"):
            self.answer(200, {"success": True, "commitOid": "a" * 40, "hookOutput": "",
                              "commitUrl": f"http://127.0.0.1:{self.server.server_port}/me/model/commit/{'a' * 40}"})
        else:
            self.answer(200, {})

    def do_GET(self):
        self.answer(self.server.refusal or 200, {})

    def answer(self, code, content):
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub, to which huggingface_hub talks with a token of its own; `calls` has what it was sent."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.refusal = [], None
    # The library has read these from the environment when it was imported.
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("---\nlicense: unknown\n---\n# a client\n")
    (tmp_path / "out" / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return tmp_path / "out"


def test_every_file_arrives_in_one_commit(hub, folder):
    check_can_push("me/model")
    assert push(folder, "me/model").endswith("/me/model")
    (_, token, created), = [call for call in hub.calls if call[0] == "/api/repos/create"]
    assert token == "Bearer hf_of_the_test" and json.loads(created)["visibility"] == "private"
    (_, _, commit), = [call for call in hub.calls if call[0] == "/api/models/me/model/commit/main"]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = [line["value"] for line in lines if line["key"] == "file"]
    files = {file["path"]: base64.b64decode(file["content"]) for file in sent}
    assert files == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_refusal_leaves_the_folder_and_says_how_to_go_on(hub, folder):
    hub.refusal = 403
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match=r"me/model: not uploaded \(.*403.*is complete.*hf upload me/model"):
        push(folder, "me/model")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_hub_that_cannot_be_reached(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no service has this port
    with pytest.raises(InputError, match=r"not uploaded \(.*check the network, the token and its rights"):
        push(folder, "me/model")


def test_what_can_be_known_before_anything_is_written(hub, monkeypatch):
    for name in ("a/b/c", "--bad--", "white space/x"):
        with pytest.raises(InputError, match="is not a repository's name"):
            check_can_push(name)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=r"no token of the Hugging Face Hub.*HF_TOKEN.*Nothing was written"):
        check_can_push("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        check_can_push("me/model")
    assert not hub.calls


def test_the_command_goes_online_for_this_option_alone(tmp_path):
    """Without a token it ends before it reads the run; it does not say that the command itself is offline."""
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")} | {"HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "pilot_jax", "export", "run", "--client", "a", "--out", "new",
                           "--push-to-hub=me/model"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "no token of the Hugging Face Hub" in done.stderr, done.stderr
    assert not (tmp_path / "new").exists()
