"""The 1F1B schedule: after the pipeline has filled, a stage alternates between forward and backward passes.

References:
    Narayanan et al. (2019), PipeDream: Generalized Pipeline Parallelism for DNN Training.
    Narayanan et al. (2021), Memory-Efficient Pipeline-Parallel DNN Training: PipeDream-Flush.
"""

from collections.abc import Callable

from torch import Tensor

from revnet.distributed.pipeline._link import Link

Forward = Callable[[int, list[Tensor]], list[Tensor]]
"""Function that takes the number of a microbatch and its input, and returns its output."""
Backward = Callable[[int, list[Tensor]], list[Tensor]]
"""Function that takes the number of a microbatch and what the next stage has sent, and returns what the stage before
needs."""


def one_forward_one_backward(link: Link, num_microbatches: int, forward: Forward, backward: Backward) -> None:
    """Run the forward and backward passes of all microbatches.

    The passes of both directions are in the order of the microbatches. A message to a neighbor and the next message
    from it are exchanged together, so that neither waits for the other.
    """
    num_ahead = min(num_microbatches, link.num_stages - 1 - link.index)

    def receive_input(is_needed: bool = True) -> list[Tensor]:
        if not is_needed:
            return []
        link.receive_header(num_microbatches)
        return link.exchange(from_previous=True)

    # Fill the pipeline.
    for number in range(num_ahead):
        link.exchange(to_next=forward(number, receive_input()))
    # One forward pass, one backward pass.
    inputs = receive_input(num_ahead < num_microbatches)
    for number in range(num_ahead, num_microbatches):
        output = forward(number, inputs)
        received = link.exchange(to_next=output, from_next=True)
        # Sent, and not needed until it comes back.
        del output
        result = backward(number - num_ahead, received)
        inputs = link.exchange(to_previous=result, from_previous=number + 1 < num_microbatches)
        del result
    # Empty the pipeline.
    for number in range(num_microbatches - num_ahead, num_microbatches):
        link.exchange(to_previous=backward(number, link.exchange(from_next=True)))


def only_forward(link: Link, num_microbatches: int, forward: Forward) -> None:
    """Run the forward passes of all microbatches."""
    for number in range(num_microbatches):
        link.receive_header(num_microbatches)
        link.exchange(to_next=forward(number, link.exchange(from_previous=True)))
