"""Tests what is chosen from a device's memory, and that a run which does not fit ends before anything is loaded."""

from __future__ import annotations

import json

import pytest
from conftest import QUICK, ROOT, small_config

from pilot_jax.config import load_config
from pilot_jax.errors import InputError
from pilot_jax.planning import choices, estimate
from pilot_jax.planning.choices import SPARE, Device, chosen

AUTO = {"model": {"remat": "auto"}, "system": {"client_chunk": "auto", "attention": "auto"}}


def total(remat, chunk):
    """Returns the bytes that `plan` has for these values."""
    plan = estimate.make_plan(small_config(model={"remat": remat}, system={"client_chunk": chunk}))
    return max(kinds["total"] for kinds in plan["memory_per_device"].values())


@pytest.mark.slow
def test_the_fastest_step_that_fits(monkeypatch):
    """More clients at once as memory grows, and activations are computed again only where storing one client's fails.
    Whatever is chosen has the bytes that `plan` counts for it."""
    monkeypatch.setattr(choices, "MOST_AT_ONCE", 3)
    config, seen = small_config(**AUTO), []
    for bytes_ in (1.01 * total(True, 1), 1.01 * total("selective", 1), 1.01 * total(False, 1), 1.01 * total(False, 2),
                   1e12):
        made, line = chosen(config, Device("tpu", bytes_ / (1 - SPARE)))
        seen.append((made.model.remat, made.system.client_chunk))
        assert total(*seen[-1]) <= bytes_ and made.system.attention == "own" and "cudnn needs an NVIDIA GPU" in line
    assert seen == [(True, 1), ("selective", 1), (False, 1), (False, 2), (False, 3)]
    with pytest.raises(InputError, match=r"Try .*model\.base=nf4.*Nothing was loaded"):
        chosen(config, Device("tpu", 0.99 * total(True, 1)))


def test_what_is_given_is_kept():
    """Only what is auto is chosen; what does not fit as given is an error that says what would help."""
    config = small_config(system={"client_chunk": 2})
    made, line = chosen(config, Device("gpu", 1e12))
    assert made == config and "as configured" in line
    with pytest.raises(InputError, match=r"model\.remat=true, system\.client_chunk=1"):
        chosen(config, Device("gpu", 1e6))


@pytest.mark.slow
def test_cudnn_is_chosen_where_it_can_train():
    config = small_config(model={"dtype": "bfloat16"}, system={"attention": "auto", "client_chunk": 1})
    assert chosen(config, Device("gpu", 1e12))[0].system.attention == "cudnn"
    for other in ({"model": {"dtype": "float32"}}, {"system": {"mesh": {"fsdp": 2}}}):
        sections = {"system": {"attention": "auto", "client_chunk": 1}} | other
        if "system" in other:
            sections["system"] = {"attention": "auto", "client_chunk": 1} | other["system"]
        assert chosen(small_config(**sections), Device("gpu", 1e12))[0].system.attention == "own"


@pytest.mark.long
def test_commands_say_what_they_chose(call, monkeypatch, tmp_path):
    """`plan` prints the choices first. A run that does not fit ends with exit code 2 and writes nothing."""
    keys = ("model.remat", "system.client_chunk", "system.attention")
    auto = [word for key in keys for word in ("--set", f"{key}=auto")]
    code, out, _ = call("plan", QUICK, "--device", "24gb", *auto)
    assert code == 0 and out.startswith("a device of 24.0 GB: stores activations, 9 clients at once")
    assert json.loads(call("plan", QUICK, "--device", "v5e", "--json")[1])["choices"].startswith("a device of 16.0 GB")
    monkeypatch.setattr(choices, "this_device", lambda: Device("gpu", 1e7))
    code, _, err = call("run", QUICK, "--out", tmp_path / "run")
    assert code == 2 and "Nothing was loaded" in err and not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"system\.client_chunk: auto is for the commands"):
        _ = small_config(system={"client_chunk": "auto"}).system.chunk


@pytest.mark.long
@pytest.mark.parametrize(("device", "base", "expected"), [
    ("16gb", "nf4", (True, 1, "cudnn")), ("24gb", "nf4", (True, 1, "cudnn")), ("80gb", "null", (False, 1, "cudnn")),
    ("141gb", "null", (False, 3, "cudnn")), ("v5e", "nf4", (True, 1, "own")), ("v6e", "null", (True, 1, "own"))])
def test_llava_7b_on_known_devices(device, base, expected):
    config = load_config(ROOT / "configs" / "llava15_7b.yaml", [
        "model.remat=auto", "system.client_chunk=auto", "system.attention=auto", f"model.base={base}"])
    made = chosen(config, choices.DEVICES[device])[0]
    assert (made.model.remat, made.system.client_chunk, made.system.attention) == expected
