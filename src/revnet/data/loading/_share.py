"""The part of every global batch that one of several processes reads."""

from dataclasses import dataclass
from itertools import pairwise

from revnet._units import nearest_multiples


@dataclass(frozen=True)
class Share:
    """Part of every global batch that one process reads, cut into consecutive parts.

    Raises:
        ValueError: A number is out of range.
    """

    rank: int = 0
    """Number of the process, from 0."""
    num_processes: int = 1
    """Number of processes that divide each global batch."""
    num_parts: int = 1
    """Number of parts of a process's slice, each of which is yielded as one batch."""

    def __post_init__(self) -> None:
        for name in ("num_processes", "num_parts"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` (={getattr(self, name)}) must be positive; pass 1 not to divide batches.")
        if not 0 <= self.rank < self.num_processes:
            raise ValueError(
                f"`rank` (={self.rank}) must be from 0 to {self.num_processes - 1}, since `num_processes` is "
                f"{self.num_processes}; pass the number of this process."
            )

    @property
    def is_whole(self) -> bool:
        """Whether this process yields global batches as they are."""
        return self.num_processes == self.num_parts == 1

    def check_batch_size(self, batch_size: int) -> None:
        """Raise unless batches of this size can be divided into equal parts."""
        unit = self.num_processes * self.num_parts
        if batch_size % unit:
            raise ValueError(
                f"`batch_size` (={batch_size}) must be a multiple of {unit}, since each batch is divided among "
                f"{self.num_processes} process{'es' * (self.num_processes > 1)} in {self.num_parts} "
                f"part{'s' * (self.num_parts > 1)}; pass {nearest_multiples(batch_size, unit)}."
            )

    def check_num_samples(self, num_samples: int, samples: str) -> None:
        """Raise unless every process gets one of the `samples`, such as "images of the split"."""
        if num_samples < self.num_processes:
            raise ValueError(
                f"`num_processes` (={self.num_processes}) must not exceed the {num_samples} {samples}, since each "
                "process needs one; use fewer processes, or pass more data."
            )

    def global_batches(self, num_samples: int, batch_size: int, *, drop_last: bool) -> list[range]:
        """Return the samples of each global batch, at least one for every process.

        Without `drop_last`, the last batch may be smaller. If it would have fewer samples than there are processes, the
        batch before it takes them.
        """
        if drop_last:
            return [range(start, start + batch_size) for start in range(0, num_samples - batch_size + 1, batch_size)]
        starts = list(range(0, num_samples, max(batch_size, self.num_processes)))
        if len(starts) > 1 and num_samples - starts[-1] < self.num_processes:
            starts.pop()
        return [range(start, stop) for start, stop in pairwise([*starts, num_samples])]

    def parts(self, batch: range) -> list[range]:
        """Return this process's parts of one global batch: contiguous, and of sizes that differ by at most one."""
        size, num_larger = divmod(len(batch), self.num_processes * self.num_parts)
        first = self.rank * self.num_parts
        cuts = [part * size + min(part, num_larger) for part in range(first, first + self.num_parts + 1)]
        return [batch[start:stop] for start, stop in pairwise(cuts)]
