"""Checks that a command refuses its input as it should."""

from __future__ import annotations


def refused(call, folder, args, wanted):
    """Checks that a command ends with exit code 2 and a message that has the `wanted` texts, and writes nothing."""
    before = sorted(p.name for p in folder.iterdir())
    code, out, err = call(*args)
    assert code == 2, (out, err)
    for text in wanted:
        assert text in err, err
    assert "Traceback" not in err and "Error: " in err
    assert not any(ord(c) < 32 and c != "\n" for c in err), "control characters reach the terminal"
    assert sorted(p.name for p in folder.iterdir()) == before
