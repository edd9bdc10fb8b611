"""The base models that are part of the package, and the paths that a model's name stands for."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "embedded"
PACKAGED = {EMBEDDED: "base", "instructed": "instructed"}  # folder in `ASSETS` of each base that is in the package
ASSETS = Path(__file__).parent.parent / "embedded" / "assets"


def model_directory(path: str | Path) -> Path:
    """Returns the directory that `path` names; "embedded" and "instructed" name bases that are part of the package."""
    return ASSETS / PACKAGED[str(path)] if str(path) in PACKAGED else Path(path).expanduser()


def shapes_directory(path: str | Path) -> Path:
    """Returns `model_directory(path)` or, if that does not exist, a folder with the config of a well-known model.

    The package holds such folders, so that a run can be planned without the model's weights.
    """
    directory = model_directory(path)
    known = ASSETS / "shapes" / Path(str(path)).name
    return known if not directory.exists() and known.is_dir() else directory
