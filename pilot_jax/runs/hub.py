"""Uploads an exported folder to the Hugging Face Hub, on request only."""

from __future__ import annotations

from pathlib import Path

from pilot_jax.errors import InputError


def check_can_push(repo: str) -> None:
    """Checks what can be checked without the network, before anything is written.

    Raises:
        InputError: the name of the repository is not valid, there is no token, or the network is switched off.
    """
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub: {repo!r} is not a repository's name ({error}). Give owner/name.") from None
    if is_offline_mode():
        raise InputError("--push-to-hub: HF_HUB_OFFLINE is set, which forbids it. Unset it, or leave the option out. "
                         "Nothing was written.")
    if get_token() is None:
        raise InputError("--push-to-hub: no token of the Hugging Face Hub. Log in (hf auth login), or set HF_TOKEN. "
                         "Nothing was written.")


def push(folder: Path, repo: str) -> str:
    """Uploads a folder's files to a model repository, in one commit, and returns its address.

    A repository that does not exist is made, private.

    Raises:
        InputError: the hub cannot be reached, or refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="pilot_jax")
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a client's model from pilot_jax")
    except Exception as error:  # of its HTTP library, of the hub's own kinds, or OSError
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"--push-to-hub: {repo}: not uploaded ({why}). {folder} is complete: check the network, the "
                         f"token and its rights, and upload it by: hf upload {repo} {folder}") from None
    return str(url)
