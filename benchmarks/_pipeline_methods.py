"""Ways to train one network on several processes: revnet's pipeline, PyTorch's schedules, and DDP."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from revnet import AbstractPolicy, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.distributed import Pipeline, ReversibleStage, StageModule, cut_into_stages

NUM_CLASSES = 10
IN_CHANNELS = 3


def residual(num_channels: int) -> nn.Sequential:
    """Return two convolutions with batch norm and dropout."""
    layers: list[nn.Module] = []
    for _ in range(2):
        convolution = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)
        layers += [nn.BatchNorm2d(num_channels), nn.ReLU(), convolution]
    return nn.Sequential(*layers, nn.Dropout(0.2))


class Network(nn.Module):
    """A stem, reversible blocks and a head for images."""

    def __init__(self, num_blocks: int, num_channels: int, policy: AbstractPolicy):
        super().__init__()
        torch.manual_seed(0)
        blocks = [ReversibleBlock(residual(num_channels), residual(num_channels)) for _ in range(num_blocks)]
        width = 2 * num_channels
        self.stem = nn.Sequential(nn.Conv2d(IN_CHANNELS, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.blocks = ReversibleSequential(*blocks, policy=policy)
        # Without a norm, which would make the gradient of the stem's bias zero, so that only rounding is left of it.
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, NUM_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.blocks(self.stem(x)))


def seed_stage(index: int) -> None:
    """Let each stage draw numbers of its own."""
    torch.manual_seed(100 + index)


class OrdinaryStage(nn.Module):
    """A stage as PyTorch's schedules expect it, which passes on the pair of streams."""

    def __init__(self, stage: StageModule):
        super().__init__()
        self.stage = stage

    def forward(self, *inputs: Tensor) -> Any:
        """Return the streams, or the logits in the last stage."""
        x: Any = inputs
        if self.stage.stem is not None:
            x = tuple(part.clone() for part in self.stage.stem(*inputs).chunk(2, 1))
        x = self.stage.blocks(x)
        return x if self.stage.head is None else self.stage.head(torch.cat(x, 1))


class AbstractMethod(abc.ABC):
    """One way to train the network. Each process has an instance."""

    name: str
    module: nn.Module
    """Module with the parameters that this process trains."""

    @abc.abstractmethod
    def step(self, x: Tensor, target: Tensor) -> None:
        """Run the forward and backward passes of a batch."""

    @abc.abstractmethod
    def watch(self, note: Callable[[], None]) -> None:
        """Call `note` just before each pass of a microbatch."""

    @abc.abstractmethod
    def sent_bytes(self) -> int:
        """Return the bytes that this process has sent in the last step."""


def call_before(owner: Any, name: str, note: Callable[[], None]) -> None:
    """Replace a method by one that calls `note` first."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        note()
        return method(*args, **kwargs)

    setattr(owner, name, call)


class RevnetPipeline(AbstractMethod):
    """`revnet.distributed.Pipeline`."""

    name = "revnet `Pipeline`"

    def __init__(self, network: Network, counts: Sequence[int], num_microbatches: int):
        self.pipeline = Pipeline(
            network.blocks,
            stem=network.stem,
            head=network.head,
            num_microbatches=num_microbatches,
            num_blocks=counts,
        )
        self.module = self.pipeline.stage

    def step(self, x: Tensor, target: Tensor) -> None:
        """Run the forward and backward passes of a batch."""
        self.pipeline.step(x, target, F.cross_entropy)

    def watch(self, note: Callable[[], None]) -> None:
        """Call `note` just before each pass of a microbatch."""
        call_before(self.pipeline._runner, "forward", note)
        call_before(self.pipeline._runner, "backward", note)

    def sent_bytes(self) -> int:
        """Return the bytes that this process has sent in the last step."""
        return self.pipeline.traffic.forward_bytes + self.pipeline.traffic.backward_bytes


class Scheduled(AbstractMethod):
    """A stage under one of PyTorch's schedules."""

    def __init__(self, name: str, schedule: type, stage: PipelineStage, module: StageModule, num_microbatches: int):
        self.name, self.module, self.stage = name, module, stage
        self.schedule = schedule(stage, num_microbatches, loss_fn=F.cross_entropy)
        self._sent = 0
        for method in ("get_fwd_send_ops", "get_bwd_send_ops"):
            self._count(method)

    def _count(self, name: str) -> None:
        method = getattr(self.stage, name)

        def counted(number: int) -> Any:
            operations = method(number)
            self._sent += sum(operation.tensor.nbytes for operation in operations)
            return operations

        setattr(self.stage, name, counted)

    def step(self, x: Tensor, target: Tensor) -> None:
        """Run the forward and backward passes of a batch."""
        self._sent = 0
        inputs = (x,) if self.stage.is_first else ()
        keywords = {"target": target, "losses": []} if self.stage.is_last else {}
        self.schedule.step(*inputs, **keywords, return_outputs=False)

    def watch(self, note: Callable[[], None]) -> None:
        """Call `note` just before each pass of a microbatch."""
        call_before(self.stage, "forward_one_chunk", note)
        call_before(self.stage, "backward_one_chunk", note)

    def sent_bytes(self) -> int:
        """Return the bytes that this process has sent in the last step."""
        return self._sent


class DataParallel(AbstractMethod):
    """The whole network in each process, which gets a part of the batch."""

    def __init__(self, name: str, network: Network):
        self.name, self.module = name, network
        self.parallel = DistributedDataParallel(network)
        self._note: Callable[[], None] = lambda: None

    def step(self, x: Tensor, target: Tensor) -> None:
        """Run the forward and backward passes of a batch."""
        rank, num_processes = dist.get_rank(), dist.get_world_size()
        loss = F.cross_entropy(self.parallel(x.chunk(num_processes)[rank]), target.chunk(num_processes)[rank])
        self._note()
        loss.backward()

    def watch(self, note: Callable[[], None]) -> None:
        """Call `note` before the backward pass."""
        self._note = note

    def sent_bytes(self) -> int:
        """Return the bytes of the gradients, which a ring sends about twice."""
        return sum(parameter.nbytes for parameter in self.module.parameters())


def make_methods(
    counts: Sequence[int], num_channels: int, num_microbatches: int, dtype: torch.dtype, *, with_ddp: bool
) -> list[AbstractMethod]:
    """Return all methods, each with a network of its own that has the same parameters."""
    rank = dist.get_rank()

    def network(policy: AbstractPolicy) -> Network:
        return Network(sum(counts), num_channels, policy).to(dtype)

    def stage(policy: AbstractPolicy) -> StageModule:
        whole = network(policy)
        stages = cut_into_stages(whole.blocks, len(counts), num_blocks=list(counts), stem=whole.stem, head=whole.head)
        return stages[rank]

    methods: list[AbstractMethod] = [RevnetPipeline(network(Reverse()), list(counts), num_microbatches)]
    schedules = (("1F1B", Schedule1F1B), ("GPipe", ScheduleGPipe))
    for name, schedule in schedules:
        own = stage(Reverse())
        methods.append(
            Scheduled(f"PyTorch's {name}, `ReversibleStage`", schedule, ReversibleStage(own), own, num_microbatches)
        )
    for name, schedule in schedules:
        for kind, policy in (("reversed", Reverse()), ("stored", Store())):
            own = stage(policy)
            ordinary = PipelineStage(OrdinaryStage(own), rank, len(counts), torch.device("cpu"))
            methods.append(Scheduled(f"PyTorch's {name}, {kind}", schedule, ordinary, own, num_microbatches))
    if with_ddp:
        methods += [DataParallel("DDP, reversed", network(Reverse())), DataParallel("DDP, stored", network(Store()))]
    return methods
