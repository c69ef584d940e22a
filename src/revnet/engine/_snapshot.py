"""The streams at one place of a chain, held for the backward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from revnet._torch_internals import in_functorch_transform
from revnet.engine._tensors import version_of
from revnet.errors import ReconstructionError


class StreamSnapshot:
    """The streams at one position of a chain: `position` half-blocks lie before it.

    A snapshot notices when its tensors are written to. It is walked back in place: `take` gives a stream away, and
    `put` sets the one that was rebuilt from it.
    """

    __slots__ = ("_versions", "held", "origin", "position", "strides")

    def __init__(self, position: int, tensors: Sequence[Tensor | None], strides: Sequence[tuple[int, ...]]):
        self.position = position
        self.origin = position
        """The position at which the streams were true; from there they were rebuilt."""
        self.strides = strides
        """How the forward pass laid each stream out: kernels round differently on another layout."""
        self.held = list(tensors)
        """The streams as they lie; None for one that is not needed."""
        self._versions = [0 if tensor is None else version_of(tensor) for tensor in tensors]

    @classmethod
    def of(cls, position: int, streams: Sequence[Tensor]) -> "StreamSnapshot":
        """Return a snapshot of `streams`, as they lie."""
        return cls(position, [each.detach() for each in streams], [each.stride() for each in streams])

    def fork(self) -> "StreamSnapshot":
        """Return the same streams, to be walked back on their own. Both see one memory, so neither writes to it."""
        held = [None if tensor is None else self.read(which).detach() for which, tensor in enumerate(self.held)]
        fork = StreamSnapshot(self.position, held, self.strides)
        fork.origin = self.origin
        return fork

    def replace_with(self, other: "StreamSnapshot") -> None:
        """Become what `other` is, which is given up."""
        self.position, self.origin, self.strides = other.position, other.origin, other.strides
        self.held, self._versions = other.held, other._versions

    def read(self, which: int) -> Tensor:
        """Return one stream, laid out as the forward pass laid it out."""
        tensor = self.held[which]
        assert tensor is not None
        if tensor._version != self._versions[which]:
            self._check_version(which)
        if tensor.stride() != self.strides[which]:
            self._lay_out()
            tensor = self.held[which]
            assert tensor is not None
        return tensor

    def _lay_out(self) -> None:
        """Lay out all streams as in the forward pass."""
        # All at once: parts of one output share its memory, which one part alone would keep.
        for which, tensor in enumerate(self.held):
            if tensor is not None and tensor.stride() != self.strides[which]:
                self._check_version(which)
                dense = torch.empty_strided(tensor.shape, self.strides[which], dtype=tensor.dtype, device=tensor.device)
                self.put(which, dense.copy_(tensor))

    def _check_version(self, which: int) -> None:
        tensor = self.held[which]
        if tensor is not None and version_of(tensor) != self._versions[which]:
            raise ReconstructionError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: an "
                f"output of a reversible sequence, of shape {tuple(tensor.shape)}, is at version {version_of(tensor)}; "
                f"expected version {self._versions[which]}. The activations are rebuilt from that output: use the "
                "operation's out-of-place form, or the policy `Store()` for the last block."
            )

    def is_unmodified(self, which: int) -> bool:
        """Return whether a stream is at the version at which it was put."""
        tensor = self.held[which]
        return tensor is not None and version_of(tensor) == self._versions[which]

    def check_memory(self) -> None:
        """Raise if the memory of a stream was freed, which a read would crash on."""
        for tensor in self.held:
            if type(tensor) is not Tensor or in_functorch_transform() or tensor.layout is not torch.strided:
                continue
            try:
                is_there = tensor.untyped_storage().nbytes() >= tensor.nbytes
            except RuntimeError:  # Batched by a transform that is over: reading it raises.
                continue
            if not is_there and tensor.untyped_storage().nbytes() == 0:
                raise ReconstructionError(
                    f"the memory of an output of a reversible sequence, of shape {tuple(tensor.shape)}, was freed "
                    "after the forward pass (`untyped_storage().resize_(0)`), so the activations cannot be rebuilt; "
                    "restore it before `backward`, or keep the last block's activations with the policy `Store()`."
                )

    def take(self, which: int) -> Tensor:
        """Return one stream without keeping it, so that the caller owns it unless another tensor sees the memory."""
        tensor = self.read(which)
        self.held[which] = None
        return tensor

    def put(self, which: int, tensor: Tensor) -> None:
        """Set one stream."""
        self.held[which] = tensor
        self._versions[which] = tensor._version
