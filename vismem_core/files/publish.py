"""Putting a trained memory on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vismem_core.errors import CheckpointError

from . import card, hub
from .checkpoint import ABOUT, WEIGHTS, description


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    message: str = "",
) -> str:
    """Publish the memory in a folder: weights, description, report and card; the repository is made if there is none.

    A card that is there keeps what people wrote.

    Args:
        repo: hub id, ``user/name``.
        private: whether a new repository is; by default as the account has it.
        revision: a branch, made if there is none; by default the main one.
        license: of the memory, for a card that has none.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: there is no whole memory in the folder, or the hub takes nothing.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import EntryNotFoundError, LocalTokenNotFoundError

    folder = Path(folder)
    about = description(folder)
    api = HfApi(library_name="vismem")
    try:
        repo = str(api.create_repo(repo, private=private, exist_ok=True).repo_id)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        try:
            old = Path(api.hf_hub_download(repo, card.CARD, revision=revision)).read_text(encoding="utf-8")
        except EntryNotFoundError:
            old = _written(folder)
        told = card.text(about, card.reported(folder), repo, old, license=license)
        names = [name for name in (WEIGHTS, ABOUT, card.REPORT) if (folder / name).is_file()]
        parts = [CommitOperationAdd(name, str(folder / name)) for name in names]
        parts.append(CommitOperationAdd(card.CARD, told.encode()))
        made: Any = api.create_commit(
            repo, parts, commit_message=message or "Memory trained with vismem", revision=revision
        )
    except LocalTokenNotFoundError:
        raise CheckpointError(f"{repo}: not published: sign in with hf auth login, or set HF_TOKEN") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{repo}: not published: {card.CARD} is no UTF-8: {error}") from error
    except Exception as error:  # the hub's refusals, and whatever the library's own transport raises
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        advice = "; sign in with hf auth login, or set HF_TOKEN, for an account that may write there" if refused else ""
        raise CheckpointError(f"{repo}: not published: {hub.reason(error)}{advice}") from error
    return str(made.commit_url)


def _written(folder: Path) -> str:
    path = folder / card.CARD
    return path.read_text(encoding="utf-8") if path.is_file() else ""
