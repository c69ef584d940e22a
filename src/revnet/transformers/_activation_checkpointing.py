"""The switches of transformers for activation checkpointing, as policies."""

from typing import Any

from revnet.models import ReversibleTransformer

_CHECKPOINT_OPTIONS = {"use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"}
"""Options of `torch.utils.checkpoint.checkpoint`, which have no meaning under `Reverse()`."""


class ActivationCheckpointing:
    """The part of `ReversibleTransformerForCausalLM` that switches policies."""

    transformer: ReversibleTransformer
    """The network."""

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether any block has another policy than `Store()`."""
        return self.transformer.is_activation_checkpointing

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Earlier name of `is_activation_checkpointing`."""
        return self.is_activation_checkpointing

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Give every `every_n_layers`-th block the policy `Reverse()`, or `Offload()`, and the others `Store()`.

        Args:
            activation_checkpointing_kwargs: `every_n_layers` and `offload`, if they are not passed by themselves, and
                options of `torch.utils.checkpoint.checkpoint`, which have no effect.
            every_n_layers: 1 for all blocks, 2 for every other block, and so on.
            offload: Whether to keep the activations of these blocks in host memory instead of rebuilding them.

        Raises:
            TypeError: `offload` is not a bool.
            ValueError: An option is not known, or `every_n_layers` is not a positive integer.
        """
        options = dict(activation_checkpointing_kwargs or {})
        every_n_layers = options.pop("every_n_layers", every_n_layers)
        offload = options.pop("offload", offload)
        unknown = options.keys() - _CHECKPOINT_OPTIONS
        if unknown:
            known = ", ".join(sorted(_CHECKPOINT_OPTIONS))
            raise ValueError(
                f"`activation_checkpointing_kwargs` has {min(unknown)!r}, which is not an option of checkpoints; they "
                f"are {known}, and have no effect here."
            )
        self.transformer.activation_checkpointing_enable(every_n_layers=every_n_layers, offload=offload)

    def activation_checkpointing_disable(self) -> None:
        """Give all blocks the policy `Store()`: the stored twin."""
        self.transformer.activation_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Do the same as `activation_checkpointing_enable`, under its earlier name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Do the same as `activation_checkpointing_disable`, under its earlier name."""
        self.activation_checkpointing_disable()
