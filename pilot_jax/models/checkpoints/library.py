"""Imports transformers. The command line imports it without torch, which it would import wherever that is installed."""

from __future__ import annotations

import sys
from typing import Any

# What the package uses of transformers; each brings modules that look for torch when they are imported.
USED = ("AutoConfig", "AutoTokenizer", "LlavaConfig", "PreTrainedTokenizerFast", "BitImageProcessorPil",
        "CLIPImageProcessorPil", "LlavaImageProcessorPil", "SiglipImageProcessorPil")
_without_torch = False


def leave_out_torch() -> None:
    """Makes this process import transformers as if torch were not installed, which saves seconds and 200 MB.

    Its torch models cannot be used in this process then, so only the command line calls this function.
    """
    global _without_torch
    _without_torch = True


def transformers() -> Any:
    """Returns the module transformers."""
    if _without_torch and "transformers" not in sys.modules and "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's mark of a module that cannot be imported
        try:
            import transformers
            for name in USED:
                getattr(transformers, name)
        finally:
            del sys.modules["torch"]
    import transformers
    return transformers
