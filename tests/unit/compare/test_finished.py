"""Results of a comparison that were computed once are read again, and never overwritten by those of other settings."""

import json

import pytest

from pilot_jax.compare.finished import once


def test_results_are_kept_for_each_of_several_settings(tmp_path):
    file = tmp_path / "variants" / "local.json"
    first = once(file, ["a", 1], lambda: {"score": 1})
    second = once(file, ["a", 2], lambda: {"score": 2})
    assert first[1] and second[1] and json.loads(file.read_text())["score"] == 2
    for inputs, (record, _) in ((["a", 1], first), (["a", 2], second), (["a", 1], first)):
        assert once(file, inputs, lambda: pytest.fail("computed again")) == (record, False)
    third, new = once(file, ["a", 3], lambda: {"score": 3})
    assert new and third["score"] == 3
    assert [once(file, ["a", n], lambda: pytest.fail("computed again"))[0]["score"] for n in (1, 2, 3)] == [1, 2, 3]


def test_what_a_failed_computation_would_replace_stays(tmp_path):
    file = tmp_path / "local.json"
    once(file, [1], lambda: {"score": 1})
    with pytest.raises(KeyboardInterrupt):
        once(file, [2], lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert [p.name for p in tmp_path.iterdir()] == ["local.json"]
    assert once(file, [1], lambda: pytest.fail("computed again"))[0]["score"] == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"fingerprint": 3}', '{"fingerprint": "../../x"}',
                                     "[" * 99999])
def test_a_damaged_file_is_computed_again(tmp_path, content):
    file = tmp_path / "local.json"
    file.write_text(content)
    assert once(file, [1], lambda: {"score": 1}) == (json.loads(file.read_text()), True)
    assert [p.name for p in tmp_path.iterdir()] == ["local.json"]
