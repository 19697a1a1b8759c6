"""What is looked for on the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vismem_core.errors import CheckpointError

CODE = re.compile(r"\d{3} \w+ Error")


def fetch(repo: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a published memory: the files of these names alone.

    Raises:
        CheckpointError: there is none, or it cannot be reached and is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(names)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        unreached = isinstance(error, LocalEntryNotFoundError)
        why = "it was not asked or not reached, and the cache has none" if unreached else reason(error)
        at = f"{repo}@{revision}" if revision else repo
        raise CheckpointError(f"{at}: no such folder here, and no memory on the hub ({why})") from error


def reason(error: Exception) -> str:
    """What a library of the hub says, in one line; a code is said again where words follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if CODE.match(lines[0]) else lines[0]
