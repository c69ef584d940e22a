"""The three methods of `huggingface_hub.PyTorchModelHubMixin` for the networks of this library.

The mixin itself would make huggingface_hub a dependency of `import revnet`. It also builds a model before it looks at
the tensors, falls back to pickled files, and does not restore policies and couplings. The methods here have its names
and arguments, and write the files that it reads: `config.json` with the arguments of the constructor,
`model.safetensors` with the tensors by their names in the network, and `README.md`.
"""

import inspect
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from revnet._atomic_file import write_text
from revnet._checks import check_bool, describe
from revnet._paths import expand_user
from revnet.models.pretrained.building import build_network, check_rebuildable, class_of, describe_network
from revnet.models.pretrained.card import CARD, describe_class, format_card, how_to_load
from revnet.models.pretrained.hub_files import (
    CONFIG,
    PREPROCESS,
    PREPROCESS_KEY,
    WEIGHTS,
    Download,
    check_repository,
    upload,
)
from revnet.models.pretrained.reading import LABELS_KEY, RUN_KEY, Pretrained, read_pretrained
from revnet.models.pretrained.structure import unwrapped
from revnet.models.pretrained.tensor_file import write_tensors

_CLASSES: dict[str, type["HubMixin"]] = {}
"""The classes that `from_pretrained` can build, by name."""
_WRAPPERS = ("FSDP", "Parametrized")
"""Starts of the names that PyTorch gives to the classes of modules that it changes."""


class HubMixin:
    """The base of all networks of this library: loads them from folders, runs and the hub, and saves them there.

    The constructor of a subclass takes numbers, texts, and lists of them, apart from `policy` and `coupling`. A new
    network remembers these arguments for `config.json`.
    """

    _card_task: ClassVar[str | None] = None
    """Kind of input, which decides the task on the hub."""

    pretrained_config: Mapping[str, Any] = {}
    """Entries of `config.json` that the constructor does not take, such as `label_names`; empty for a new network."""
    _pretrained_tensors: Mapping[str, Tensor] = {}
    """Tensors next to the network, such as the statistics of the preprocessing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the network, and remember the arguments of its constructor."""
        network = super().__new__(cls)
        object.__setattr__(network, "_arguments", (args, kwargs))
        return network

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith(_WRAPPERS):
            known = _CLASSES.setdefault(cls.__name__, cls)
            # A cell of a notebook that runs again defines its classes again.
            if (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__):
                _CLASSES[cls.__name__] = cls

    def _changes(self) -> dict[str, Any]:
        """Return attributes that were changed after construction, as entries of `config.json`.

        Raises:
            ValueError: A change cannot be written.
        """
        return {}

    def _apply_changes(self, config: Mapping[str, Any]) -> None:
        """Take the attributes that `_changes` has returned from `config.json`, which may come from a stranger.

        Raises:
            TypeError, ValueError: They do not fit.
        """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        **model_kwargs: Any,
    ) -> Self:
        """Load a trained network, in evaluation mode.

        Policies, couplings and batch norms are the ones that the network had. The numbers have the types that they have
        in the file; call `float()` for a network that was trained in bfloat16.

        Args:
            pretrained_model_name_or_path: The folder of a run of `revnet train`, whose last weights are loaded; one of
                its `.safetensors` files; a folder that `save_pretrained` has written; or a name on the Hugging Face
                hub, such as `owner/name` or `hub:owner/name@revision`.
            force_download: Whether to download files that are in the cache.
            token: Token of the hub; None for the one of `hf auth login`.
            cache_dir: Folder for downloaded files; None for the cache of `huggingface_hub`.
            local_files_only: Whether to read the cache only.
            revision: Branch, tag or commit on the hub; None for the main branch.
            map_location: Device of the network.
            strict: Whether all tensors of the network must be in the file, and no others.
            model_kwargs: Arguments of the constructor that replace the saved ones, such as `policy=Store()`. Another
                `num_classes` replaces the head of a classifier by a new one.

        Raises:
            CheckpointError: The network does not exist, it is of another class, its files are damaged, or the hub
                cannot be reached.
            MissingDependencyError: safetensors is not installed, or huggingface_hub for a name on the hub.
            TypeError: The network has no argument of that name.
        """
        check_bool(strict=strict)
        options = Download(
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        pretrained = read_pretrained(pretrained_model_name_or_path, options)
        return _build(cls, pretrained, model_kwargs, strict=strict, device=torch.device(map_location))

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        card: str | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the network to a folder: `config.json`, `model.safetensors` and a model card, `README.md`.

        `from_pretrained` reads the folder. A network that was loaded from a run keeps its labels and its preprocessing,
        in `config.json` and `preprocess.safetensors`. A card that exists is kept.

        Args:
            save_directory: The folder, which is made if it does not exist.
            config: More entries for `config.json`, such as `{"label_names": ["cat", "dog"]}`.
            repo_id: Name of the network on the hub.
            push_to_hub: Whether to send the folder to the hub, too.
            card: Text of the model card; None for a short one.
            push_to_hub_kwargs: Arguments of `push_to_hub`.

        Returns:
            The address of the commit if `push_to_hub`; otherwise None.

        Raises:
            CheckpointError: A parameter has no values here, such as one on the meta device.
            MissingDependencyError: safetensors is not installed.
            ValueError: An argument of the constructor, or a coupling, cannot be written as JSON, the network has other
                tensors than its constructor makes, as with a parametrization, or `save_directory` is a file.
        """
        check_bool(push_to_hub=push_to_hub)
        entries = config_of(cast("Any", self), config)
        folder = expand_user(save_directory)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`save_directory` (={describe(save_directory)}) must be a folder, but is a file.")
        tensors = {unwrapped(name): tensor for name, tensor in cast("Any", self).state_dict().items()}
        check_rebuildable(_class_of(self), entries, tensors)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        if self._pretrained_tensors:
            write_tensors(folder / PREPROCESS, self._pretrained_tensors, {"format": "pt"})
        write_text(folder / CONFIG, json.dumps(entries, indent=2, sort_keys=True) + "\n")
        if card is not None or not (folder / CARD).exists():
            write_text(folder / CARD, card or _default_card(self, repo_id or folder.resolve().name))
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.resolve().name, config=config, card=card, **push_to_hub_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        config: Mapping[str, Any] | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        card: str | None = None,
        **upload_kwargs: Any,
    ) -> str:
        """Send the files of `save_pretrained` to the Hugging Face hub, in one commit.

        Args:
            repo_id: Name on the hub, `owner/name`; it is made if it does not exist.
            config: More entries for `config.json`.
            commit_message: Message of the commit.
            private: Whether a new repository is private; None for the default of its owner.
            token: Token of the hub; None for the one of `hf auth login`.
            branch: Branch, which is made if it does not exist; None for the main branch.
            create_pr: Whether to open a pull request instead.
            card: Text of the model card; None for a short one.
            upload_kwargs: Other arguments of `HfApi.upload_folder`, such as `allow_patterns`.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: The hub cannot be reached, or refuses the files.
            MissingDependencyError: huggingface_hub is not installed.
            ValueError: `repo_id` cannot be a name on the hub, or the network cannot be described as in
                `save_pretrained`.
        """
        check_repository("repo_id", repo_id)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, config=config, repo_id=repo_id, card=card)
            return upload(
                Path(folder),
                repo_id,
                private=private,
                branch=branch,
                commit_message=commit_message,
                token=token,
                create_pr=create_pr,
                **upload_kwargs,
            )


def from_pretrained(pretrained_model_name_or_path: str | Path, **options: Any) -> nn.Module:
    """Load a trained network of any class, in evaluation mode.

    Args:
        pretrained_model_name_or_path: The folder of a run of `revnet train`, a folder that `save_pretrained` has
            written, one `.safetensors` file, or a name on the Hugging Face hub, such as `owner/name`.
        options: Arguments of `HubMixin.from_pretrained`, such as `revision`, and of the network's constructor, such as
            `policy=Store()`.

    Raises:
        CheckpointError: The network does not exist, its files are damaged, or the hub cannot be reached.
        MissingDependencyError: safetensors is not installed, or huggingface_hub for a name on the hub.

    Example:
        >>> import tempfile
        >>> from revnet.models import create_model, from_pretrained
        >>> folder = tempfile.mkdtemp()
        >>> create_model("revnet38", num_classes=3).save_pretrained(folder)
        >>> from_pretrained(folder).num_classes
        3
    """
    return cast("nn.Module", HubMixin.from_pretrained(pretrained_model_name_or_path, **options))


def describe_model(network: HubMixin) -> dict[str, Any]:
    """Return everything that it takes to build a network again, except its tensors, as values for JSON.

    Raises:
        ValueError: An argument of its constructor, or a coupling, cannot be written as JSON.
    """
    network_type = _class_of(network)
    args, kwargs = getattr(network, "_arguments", ((), {}))
    signature = inspect.signature(cast("Any", network_type).__init__)
    given = signature.bind(network, *args, **kwargs)
    given.apply_defaults()
    arguments = {}
    for name, value in list(given.arguments.items())[1:]:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    return describe_network(cast("nn.Module", network), network_type.__name__, arguments) | network._changes()


def _class_of(network: HubMixin) -> type[nn.Module]:
    """Return the class of a network, without the ones by which PyTorch wraps it."""
    return next(cls for cls in type(network).__mro__ if not cls.__name__.startswith(_WRAPPERS))


def remember(network: HubMixin, pretrained: Pretrained) -> None:
    """Keep in `network` what was read next to it, for `save_pretrained`."""
    described = describe_model(network)
    network.pretrained_config = {key: value for key, value in pretrained.config.items() if key not in described}
    network._pretrained_tensors = pretrained.others


def config_of(network: HubMixin, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the entries of `config.json` for a network.

    Args:
        network: The network.
        extra: More entries.

    Raises:
        ValueError: An entry cannot be written as JSON, or the numbers of labels and classes differ.
    """
    entries = dict(network.pretrained_config)
    num_classes, labels = getattr(network, "num_classes", None), entries.get(LABELS_KEY)
    if labels is not None and num_classes != len(labels):  # the head is a new one
        entries = _without_labels(entries)
    entries |= extra or {}
    labels = entries.get(LABELS_KEY)
    if labels is not None and num_classes is not None and len(labels) != num_classes:
        raise ValueError(
            f"`{LABELS_KEY}` (of length {len(labels)}) must have one name for each of {num_classes} classes."
        )
    if network._pretrained_tensors:
        entries[PREPROCESS_KEY] = PREPROCESS
    entries |= describe_model(network)
    try:
        json.dumps(entries)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`config` (={describe(extra)}) must hold values that JSON has: {error}.") from error
    return entries


def _build(
    wanted: type[Any], pretrained: Pretrained, kwargs: Mapping[str, Any], *, strict: bool, device: torch.device
) -> Any:
    network_type: type[Any] = class_of(pretrained, _CLASSES, wanted)
    arguments, num_classes = dict(kwargs), None
    saved = pretrained.config.get("num_classes")
    if hasattr(network_type, "reset_classifier") and arguments.get("num_classes", saved) != saved:
        num_classes = arguments.pop("num_classes")
    network = build_network(network_type, pretrained, arguments, strict=strict)
    remember(network, pretrained)
    if num_classes is not None:
        network.pretrained_config = _without_labels(network.pretrained_config)
        # A network that was saved without a head may have no pooling, which a head needs.
        pooling = {"global_pool": "avg"} if num_classes and getattr(network, "global_pool", None) == "" else {}
        network.reset_classifier(num_classes, **pooling)
        network.eval()
    return network.to(device)


def _without_labels(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in (LABELS_KEY, RUN_KEY)}


def _default_card(network: HubMixin, name: str) -> str:
    module = cast("nn.Module", network)
    class_name = describe_model(network)["architectures"][0]
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    is_ours = _CLASSES[class_name].__module__.startswith("revnet.")
    loader = f"{class_name}.from_pretrained" if is_ours else "from_pretrained"
    code = [f"from revnet.models import {loader.partition('.')[0]}", "", f'model = {loader}("NAME")']
    return format_card(
        network._card_task,
        name,
        [describe_class(class_name, num_parameters), how_to_load(name, code), _labels_section(network)],
    )


def _labels_section(network: HubMixin) -> str:
    labels = network.pretrained_config.get(LABELS_KEY)
    if not labels:
        return ""
    return "The names of the classes are `model.pretrained_config['label_names']`."
