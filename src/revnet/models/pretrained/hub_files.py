"""Files of the Hugging Face hub, by the names that users write, and one line for each way in which that fails."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import revnet
from revnet._outside_text import shorten
from revnet.errors import CheckpointError, MissingDependencyError

HUB_PREFIX = "hub:"
"""Start of a name that is on the hub and not a path, as in `hub:owner/name`."""
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PREPROCESS = "preprocess.safetensors"
RUN_WEIGHTS = "last.safetensors"
_HOW_TO_LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"


@dataclass(frozen=True, kw_only=True)
class Download:
    """How to download files; the defaults are the ones of `huggingface_hub`."""

    revision: str | None = None
    """Branch, tag or commit; None for the main branch."""
    cache_dir: str | Path | None = None
    """Folder for the files."""
    force_download: bool = False
    """Whether to download files that are in the cache."""
    local_files_only: bool = False
    """Whether to read the cache only."""
    token: str | bool | None = None
    """Token of the hub; None for the one of `hf auth login`."""


def is_hub_name(name: object) -> bool:
    """Return whether `name` starts with `hub:`."""
    return os.fspath(name).startswith(HUB_PREFIX) if isinstance(name, str | os.PathLike) else False


def download(name: str, options: Download | None = None) -> Path:
    """Return a local folder with the files of a model on the hub.

    Args:
        name: `owner/name`, with `hub:` before it and `@revision` after it if wanted.
        options: How to download them.

    Raises:
        CheckpointError: No such model can be reached, or it was not written by revnet; the message says why.
        MissingDependencyError: huggingface_hub is not installed.
    """
    options = options or Download()
    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    if revision and options.revision not in (None, revision):
        raise ValueError(
            f"`revision` (={options.revision!r}) differs from the one in '{name}'; pass one of the two."
        )
    options = replace(options, revision=revision or options.revision)
    hub = require_hub(f"the model `{name}`")
    with _one_line_errors(hub, repository, options):
        config = _download_or_none(hub, repository, CONFIG, options)
        first = config or _download_or_none(hub, repository, RUN_WEIGHTS, options)
        if first is None:
            raise CheckpointError(
                f"'{repository}' on the Hugging Face hub has no {CONFIG}, so it is not a model of revnet; pass one "
                "that `revnet push` or `push_to_hub` has written."
            )
        folder = Path(first).parent
        if config is None:
            return folder
        # The other files come from the same commit, also if a push comes in between.
        if not options.local_files_only:
            options = replace(options, revision=folder.name)
        if _download_or_none(hub, repository, WEIGHTS, options) is None:
            raise CheckpointError(
                f"'{repository}' on the Hugging Face hub has no {WEIGHTS}; revnet reads no other format of weights."
            )
        _download_or_none(hub, repository, PREPROCESS, options)
        return folder


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> str:
    """Send the files in `folder` to the hub in one commit, and return the address of the commit.

    Args:
        folder: The folder.
        repository: Name on the hub, `owner/name`; it is made if it does not exist.
        private: Whether a new repository is private.
        branch: Branch, which is made if it does not exist; None for the main branch.
        commit_message: Message of the commit.
        token: Token of the hub; None for the one of `hf auth login`.
        options: Other arguments of `HfApi.upload_folder`.

    Raises:
        CheckpointError: The hub cannot be reached, or refuses the files; the message says why.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = require_hub(f"pushing to `{repository}`")
    repository = repository.removeprefix(HUB_PREFIX)
    api = hub.HfApi(token=token, library_name="revnet", library_version=revnet.__version__)
    with _one_line_errors(hub, repository, Download(token=token, revision=branch), verb="pushed"):
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if branch is not None and not options.get("create_pr"):
            api.create_branch(repository, branch=branch, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=commit_message or "Push model with revnet",
                revision=branch,
                **options,
            )
        )


def require_hub(purpose: str) -> ModuleType:
    """Return the module `huggingface_hub`, or raise an error that shows the command that installs it."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("huggingface_hub", purpose) from error
    return huggingface_hub


def describe_download(name: str | Path, folder: Path) -> str:
    """Return the name on the hub, and the commit that was downloaded, as text."""
    commit = folder.name
    return f"{name} (commit {commit[:12]})" if folder.parent.name == "snapshots" else str(name)


def _download_or_none(hub: ModuleType, repository: str, file: str, options: Download) -> str | None:
    """Return the path of a downloaded file; None if the repository does not have it."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path: str = hub.hf_hub_download(
            repository,
            file,
            revision=options.revision,
            cache_dir=options.cache_dir,
            force_download=options.force_download,
            local_files_only=options.local_files_only,
            token=options.token,
            library_name="revnet",
            library_version=revnet.__version__,
        )
    except LocalEntryNotFoundError:
        # Offline, a file that is missing in the repository looks like a file that is missing in the cache.
        if file in (PREPROCESS, RUN_WEIGHTS) and options.local_files_only:
            return None
        raise
    except EntryNotFoundError:
        return None
    return path


@contextmanager
def _one_line_errors(hub: ModuleType, repository: str, options: Download, verb: str = "loaded") -> Iterator[None]:
    from huggingface_hub import errors

    start = f"'{shorten(repository, 100)}' cannot be {verb}"
    address = hub.constants.ENDPOINT
    try:
        yield
    except CheckpointError:
        raise
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"'{shorten(repository, 100)}' is neither a path that exists nor a name on the Hugging Face hub; pass the "
            "folder of a run, a folder that `save_pretrained` has written, or owner/name."
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{start}: it is gated; accept its terms at {address}/{repository}, and {_HOW_TO_LOG_IN}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{start}: it is not a folder here, and not a model on the Hugging Face hub that you can access; check the "
            f"name, or {_HOW_TO_LOG_IN}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{start}: it has no revision {options.revision!r} on the Hugging Face hub; pass a branch, a tag or a commit."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise CheckpointError(
            f"{start}: HF_HUB_OFFLINE is set; unset it, or pass a folder that `save_pretrained` has written."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if options.local_files_only or hub.constants.is_offline_mode():
            fault = "it is not in the cache, and downloads are switched off (`local_files_only`, or HF_HUB_OFFLINE)"
        else:
            fault = f"{address} cannot be reached, and it is not in the cache"
        raise CheckpointError(
            f"{start}: {fault}; check the network and the name, or pass the path of a copy on disk."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        way_out = _HOW_TO_LOG_IN if status in (401, 403) else "check the name and the network"
        raise CheckpointError(f"{start}: the hub answers {_first_line(error)}; {way_out}.") from error
    except OSError:  # no room on the disk, for instance, which has a line of its own
        raise
    except Exception as error:  # errors of the HTTP library, which differ between releases
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")):
            raise
        raise CheckpointError(
            f"{start}: {address} cannot be reached ({_first_line(error)}); check the network, or pass the path of a "
            "copy on disk."
        ) from error


def _first_line(error: Exception) -> str:
    return shorten(str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__, 200)
