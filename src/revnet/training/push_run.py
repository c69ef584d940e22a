"""Send a run to the Hugging Face hub."""

from pathlib import Path
from typing import Any

from revnet._checks import check_path, describe
from revnet._outside_text import shorten
from revnet._paths import expand_user
from revnet._result_files import writing_to
from revnet.errors import CheckpointError, RevnetError
from revnet.models.pretrained.card import CARD
from revnet.models.pretrained.hub_files import CONFIG, PREPROCESS, WEIGHTS, check_repository
from revnet.models.pretrained.reading import is_pretrained_file, read_pretrained
from revnet.training.classification.model import Classifier
from revnet.training.density.model import ImageDensity
from revnet.training.language.model import LanguageModel
from revnet.training.model_card import write_card
from revnet.training.run.checkpoint import EPOCH_KEY, find_weights, read_weights
from revnet.training.saved_module import SavedModule

_MODULES: dict[str, type[SavedModule]] = {
    module_type.header_type.kind: module_type for module_type in (Classifier, ImageDensity, LanguageModel)
}


def push(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    dry_run: str | Path | None = None,
) -> str:
    """Send the weights of a run to the Hugging Face hub, with labels, preprocessing and a model card.

    The card is written from the files of the run: data, recipe, scores, measured bytes, drift, hardware and versions.
    What the run did not measure is left out, and so are paths of this machine.

    Args:
        checkpoint: The folder of a run, whose last weights are sent; one of its `.safetensors` files; or a folder that
            `save_pretrained` or a dry run has written, whose card is kept.
        repo_id: Name on the hub, `owner/name`; it is made if it does not exist.
        private: Whether a new repository is private; None for the default of its owner.
        branch: Branch, which is made if it does not exist; None for the main branch.
        commit_message: Message of the commit.
        token: Token of the hub; None for the one of `hf auth login`.
        dry_run: Folder to write the files to. Nothing is sent then.

    Returns:
        The address of the commit, or the folder of a dry run.

    Raises:
        CheckpointError: `checkpoint` is missing, truncated or damaged, or the hub cannot be reached or refuses the
            files.
        MissingDependencyError: huggingface_hub is not installed.
        ValueError: `repo_id` is not the name of a repository, the network is your own code, or `dry_run` holds other
            files.
    """
    check_repository("repo_id", repo_id)
    if "/" not in repo_id:
        raise ValueError(f"`repo_id` (={describe(repo_id)}) must be owner/name; put the owner before it.")
    check_path("checkpoint", checkpoint, hint="the folder of a run, or a file of weights")
    weights = find_weights(Path(checkpoint))
    module, card = _load(weights, repo_id)
    if dry_run is not None:
        check_path("dry_run", dry_run, hint="a folder, or None to send the files")
        folder = expand_user(dry_run)
        _check_dry_run(folder)
        with writing_to("dry_run", folder):
            module.save_pretrained(folder, card=card, repo_id=repo_id)
        return str(folder)
    options: dict[str, Any] = {"private": private, "branch": branch, "commit_message": commit_message, "token": token}
    return module.push_to_hub(repo_id, card=card, **options)


def _check_dry_run(folder: Path) -> None:
    """Raise if a dry run would replace files that are not from another one."""
    files = [file for name in (CONFIG, WEIGHTS, PREPROCESS) if (file := folder / name).exists()]
    if not files:
        return
    try:
        read_pretrained(folder / WEIGHTS)
    except (OSError, RevnetError) as error:
        raise ValueError(
            f"`dry_run` (='{folder}') holds another `{files[0].name}`, which would be replaced; pass a new folder."
        ) from error


def _load(weights: Path, name: str) -> tuple[SavedModule, str]:
    """Return the module of a file of weights, and its card."""
    if weights.suffix == ".ckpt" or weights.is_dir():  # a folder holds a checkpoint in shards
        raise CheckpointError(
            f"`{weights}` is a checkpoint to resume from; finish an epoch of the run, or pass a .safetensors file."
        )
    metadata = read_weights(weights).metadata
    if ":" in metadata.get("model", ""):
        raise ValueError(
            f"the network of `{weights}` ({shorten(metadata['model'])}) is your own code, which a file of weights "
            "cannot hold; share the code and the file, and load it with `load_classifier(path, model=...)`."
        )
    kind = metadata.get("kind", Classifier.header_type.kind)
    if kind not in _MODULES:
        raise CheckpointError(
            f"`{weights}` has the kind {describe(kind)}, which this revnet does not know; update revnet."
        )
    module = _MODULES[kind].from_pretrained(weights)
    if is_pretrained_file(weights) and (weights.parent / CARD).is_file():
        return module, (weights.parent / CARD).read_text(encoding="utf-8")
    return module, write_card(module, weights, name, epoch=metadata.get(EPOCH_KEY))
