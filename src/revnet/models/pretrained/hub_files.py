"""Files of the Hugging Face hub, by the names that users write, and one line for each way in which that fails."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import revnet
from revnet._checks import check_bool, describe
from revnet._documents import parse_json
from revnet._input_files import read_text
from revnet._outside_text import shorten
from revnet.errors import CheckpointError, MissingDependencyError

HUB_PREFIX = "hub:"
"""Start of a name that is on the hub and not a path, as in `hub:owner/name`."""
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PREPROCESS = "preprocess.safetensors"
PREPROCESS_KEY = "preprocess_file"
"""Key in `config.json` that says that there is a file of the preprocessing."""
MOST_CONFIG_BYTES = 2**24
"""Limit of the size of `config.json`."""
RUN_WEIGHTS = "last.safetensors"
SNAPSHOTS, _CACHED = "snapshots", "models--"
"""Name of the folder of all downloaded commits, and the start of the name of the folder above."""
_TIMEOUT_SECONDS = 10
_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
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

    def __post_init__(self) -> None:
        check_bool(force_download=self.force_download, local_files_only=self.local_files_only)
        if self.revision is not None and (not isinstance(self.revision, str) or not self.revision):
            raise TypeError(f"`revision` (={describe(self.revision)}) must be a branch, a tag or a commit, or None.")


def is_hub_name(name: object) -> bool:
    """Return whether `name` starts with `hub:`."""
    return os.fspath(name).startswith(HUB_PREFIX) if isinstance(name, str | os.PathLike) else False


def check_repository(argument: str, name: object) -> None:
    """Raise unless `name` can be the name of a repository on the hub.

    Raises:
        ValueError: It cannot be.
    """
    if not isinstance(name, str) or not _REPOSITORY.fullmatch(name.removeprefix(HUB_PREFIX)):
        raise ValueError(
            f"`{argument}` (={describe(name)}) must be a name on the Hugging Face hub, such as owner/name."
        )


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
        raise ValueError(f"`revision` (={options.revision!r}) differs from the one in '{name}'; pass one of the two.")
    options = replace(options, revision=revision or options.revision)
    require_hub(f"the model `{name}`")
    with _one_line_errors(repository, options):
        if not _is_reachable(repository, options):
            options = replace(options, local_files_only=True)
    with _one_line_errors(repository, options):
        first = _first_file(repository, options)
        if first.name != CONFIG:
            return first.parent
        # The other files come from the same commit, also if a push comes in between.
        if not options.local_files_only:
            options = replace(options, revision=first.parent.name)
        if _fetch(repository, WEIGHTS, options) is None:
            raise CheckpointError(
                f"'{repository}' on the Hugging Face hub has no {WEIGHTS}; revnet reads no other format of weights."
            )
        if names_preprocess(first):
            _fetch(repository, PREPROCESS, options)
        return first.parent


def _is_reachable(repository: str, options: Download) -> bool:
    """Return whether the hub answers; if not, the cache is used, as `huggingface_hub` does after half a minute.

    Raises:
        Exception: The hub answers that the repository or the revision does not exist.
    """
    from huggingface_hub import HfApi, constants, errors

    if options.local_files_only or constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi(token=options.token).model_info(repository, revision=options.revision, timeout=_TIMEOUT_SECONDS)
    except Exception as error:
        response = getattr(error, "response", None)
        is_broken = response is not None and response.status_code >= 500
        is_answer = isinstance(error, errors.HfHubHTTPError | errors.HFValidationError) and not is_broken
        if options.force_download or is_answer or not (is_broken or _is_network_error(error)):
            raise
        return False
    return True


def _first_file(repository: str, options: Download) -> Path:
    """Return the path of `config.json` or, in a repository with the files of a run, of its last weights."""
    from huggingface_hub import errors

    try:
        config = _fetch(repository, CONFIG, options)
    except errors.LocalEntryNotFoundError:
        if not options.local_files_only:
            raise
        config = None
    first = config or _fetch(repository, RUN_WEIGHTS, options)
    if first is None:
        raise CheckpointError(
            f"'{repository}' on the Hugging Face hub has no {CONFIG}, so it is not a model of revnet; pass one that "
            "`revnet push` or `push_to_hub` has written."
        )
    return first


def _fetch(repository: str, file: str, options: Download) -> Path | None:
    """Return the path of a downloaded file; None if the repository does not have it."""
    from huggingface_hub import errors, hf_hub_download

    try:
        path = hf_hub_download(
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
    except errors.LocalEntryNotFoundError:  # a subclass of the next one
        raise
    except errors.EntryNotFoundError:
        return None
    return Path(str(path))


def names_preprocess(config: Path) -> bool:
    """Return whether a `config.json` says that there is a file of the preprocessing."""
    try:
        return PREPROCESS_KEY in parse_json(read_text(config, MOST_CONFIG_BYTES))
    except (OSError, ValueError):  # reported by the function that reads it
        return False


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
        ValueError: `repository` cannot be a name on the hub.
    """
    check_repository("repo_id", repository)
    hub = require_hub(f"pushing to `{repository}`")
    repository = repository.removeprefix(HUB_PREFIX)
    api = hub.HfApi(token=token, library_name="revnet", library_version=revnet.__version__)
    with _one_line_errors(repository, Download(token=token, revision=branch), verb="pushed"):
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


def describe_download(weights: Path) -> str | None:
    """Return the name on the hub, and the commit, of weights in the cache of downloads; None for other weights."""
    folder = weights.parent
    owner = folder.parent.parent.name
    if folder.parent.name != SNAPSHOTS or not owner.startswith(_CACHED):
        return None
    return f"{HUB_PREFIX}{owner.removeprefix(_CACHED).replace('--', '/')} (commit {folder.name[:12]})"


@contextmanager
def _one_line_errors(repository: str, options: Download, verb: str = "loaded") -> Iterator[None]:
    from huggingface_hub import constants, errors

    start = f"'{shorten(repository, 100)}' cannot be {verb}"
    address = constants.ENDPOINT
    elsewhere = "pass a folder that `save_pretrained` has written"
    if verb == "pushed":
        elsewhere = "write the files to a folder with `save_pretrained` or `revnet push --dry-run`"
    try:
        yield
    except CheckpointError:
        raise
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"'{shorten(repository or HUB_PREFIX, 100)}' is neither a path that exists nor a name on the "
            "Hugging Face hub; pass the folder of a run, a folder that `save_pretrained` has written, or owner/name."
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
            f"{start}: it has no revision {options.revision!r} on the Hugging Face hub; pass a branch, a tag or a "
            "commit."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise CheckpointError(f"{start}: HF_HUB_OFFLINE is set; unset it, or {elsewhere}.") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{start}: it is not in the cache, and {address} cannot be reached, or HF_HUB_OFFLINE or "
            "`local_files_only` forbids it; check the name and the network, or pass the path of a copy on disk."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        way_out = _HOW_TO_LOG_IN if status in (401, 403) else "check the name and the network"
        raise CheckpointError(f"{start}: the hub answers {_first_line(error)}; {way_out}.") from error
    except OSError:  # no room on the disk, for instance, which has a line of its own
        raise
    except Exception as error:  # errors of the HTTP library, which differ between releases
        if not _is_network_error(error):
            raise
        raise CheckpointError(
            f"{start}: {address} cannot be reached ({_first_line(error)}); check the network, or {elsewhere}."
        ) from error


def _is_network_error(error: Exception) -> bool:
    """Return whether `error` is from the HTTP library, which differs between releases of `huggingface_hub`."""
    modules = ("httpx", "httpcore", "requests", "urllib3")
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(modules)


def _first_line(error: Exception) -> str:
    return shorten(str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__, 200)
