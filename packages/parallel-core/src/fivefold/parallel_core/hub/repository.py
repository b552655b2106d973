"""Names of models to folders, and folders to repositories of the Hugging Face Hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from fivefold.parallel_core.errors import CheckpointError

MODEL_FILES = ("model*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""What ``resolve`` downloads: weights, index, configuration and tokenizer; no pickles, and not the
second copy of the weights that some repositories hold as ``consolidated*.safetensors``."""

# One optional owner, letters, digits and -_. inside, 96 characters (the Hub's own rule).
_REPOSITORY = re.compile(r"(?=.{1,96}$)(?!.*(--|\.\.))\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?", re.ASCII)


def resolve(
    name_or_path: str | Path,
    revision: str | None = None,
    allow_patterns: Sequence[str] = MODEL_FILES,
) -> Path:
    """The local folder of a model, downloaded first if it is a repository's name.

    Args:
        name_or_path: an existing folder, which is returned as it is, or a repository such as
            ``"mistralai/Mixtral-8x7B-v0.1"``.
        revision: branch, tag or commit of the repository.
        allow_patterns: which of the repository's files are wanted.

    Raises:
        CheckpointError: neither a folder nor a repository that can be had.
        ImportError: a repository was asked for and huggingface_hub is not installed.
    """
    folder = Path(name_or_path).expanduser()
    if str(name_or_path) and folder.is_dir():
        return folder
    if isinstance(name_or_path, Path) or not _REPOSITORY.fullmatch(name_or_path):
        found = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{str(name_or_path)!r}: expected a folder or a repository such as 'owner/name'; "
            f"as a folder it {found}, and as a repository it is no legal name"
        )
    try:
        path = _hub().snapshot_download(
            name_or_path, revision=revision, allow_patterns=list(allow_patterns)
        )
    except (OSError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        at = f" at {revision!r}" if revision else ""
        raise CheckpointError(
            f"{name_or_path!r}: no such folder here, and the repository{at} cannot be had from "
            f"the Hub: {lines[0]}"
        ) from error
    return Path(path)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a folder to a model repository, which is made if it does not exist.

    Args:
        folder: what to upload; files of an unfinished save are left out.
        repo_id: ``"owner/name"``, or ``"name"`` for the token's own account.
        private: visibility of a new repository; None is the account's default.
        revision: branch to commit to.
        commit_message: first line of the commit.
        token: access token; None uses the one that ``hf auth login`` stored.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: no such folder.
        ImportError: huggingface_hub is not installed.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"cannot push {folder}: no such folder")
    api = _hub().HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repository.repo_id,
        folder_path=str(folder),
        revision=revision,
        commit_message=commit_message,
        ignore_patterns=["*.partial-*"],
    )
    return str(repository)


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            'repositories need huggingface_hub: pip install "fivefold-parallel-core[hub]"'
        ) from error
    return huggingface_hub
