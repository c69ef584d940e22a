"""The engine: reversible execution as a real autograd graph.

A chain of half-blocks, `y = x + f(other stream)`, runs forward in the ordinary way, but under saved-tensor hooks that
keep nothing of what autograd wants to save. Only the final streams are held. When the backward pass first asks for a
saved tensor of a half-block, the run walks the streams back to it: it runs each residual function once more on the
stream that it read, under hooks that catch what autograd now saves again, and takes its output off the stream that it
wrote. It is `torch.utils.checkpoint(use_reentrant=False)` with the input rebuilt instead of stored. Since the graph is
the real one, hooks, partial gradients, retained graphs and double backward behave as they always do.

NOTE [ Who refers to whom ]

Arrows are references; `~>` is a weak one. There is one `Rebuilder` (the *run*) for each forward pass through a chain,
one step for each half-block in it, and one `Saved` for each step of which autograd saved anything. ::

    autograd graph of one forward pass             what outlives the pass

      node  --> slot: a number                       ReversibleSequential
            --> hook, bound to the Saved               |
                  |                                    +--> Chain          half-blocks, found once
                  v                                           +--> Plan    of each function: its structure
                Saved --> tensors, while they are filled                   (no tensor)
                  |   --> others: parameters, buffers, arguments
                  |   --> constants: tensors from elsewhere
                  v
      run:  Rebuilder --> held: StreamSnapshot       final streams; walked back in place
                  |   --> walk: StreamSnapshot       a fork of it, while the graph is retained
                  |   --> keyframes                  streams held in between, under a tolerance
                  |   --> observers                  agreement, drift, tolerance, range
                  |   --> surroundings               what its calls share: arguments, devices, random states
                  v
                steps: AdditiveStep | JoinedStep     each of them a RecordedCall
                  |   --> parameters, buffers, arguments: the tensors themselves
                  |   --> versions, random states, copies of buffers that the function changes
                  +~> Saved

A slot is what the pack hook returns. Numbers from 0 up stand for tensors that are rebuilt, negative ones for tensors
that outlive the call anyway, with the versions that they had.

NOTE [ One training step ]

What calls what, and where it is. A plain step runs through these seven files and no others, which a test holds. ::

    forward   ReversibleModule.forward                nn/_reversible_module
                what it ran last, if it is made of the same
                streams split                         engine/_streams
                Reverse().run = reversible            engine/_rebuild
                  Rebuilder.run
                    for each half-block: step.first
                      RecordedCall                    engine/_record
                        is the function what its plan says? which tensors does it hold?
                      record
                        push hooks, call the function, pop hooks
                        random states and versions: did it draw, did it write?
                        forget what autograd saved; note shapes and dtypes
                      stream + residual
                      observers: digest the stream    engine/_agreement, engine/_digest
                streams joined                        engine/_streams
                  hold the final streams, or views of the joined output

    backward  autograd asks a slot of half-block i    Saved.unpack in engine/_record
                Rebuilder.rebuild(i)                  engine/_rebuild
                  observers: are the held streams what they were?
                  for each half-block above i that was not undone yet: step.undo without filling
                  step.undo of i, filling
                    observers: is the rebuilt source near enough?
                    replay                            engine/_replay
                      versions, and everything else that the function depends on: as it was?
                        if not: `restored` puts it back, for the time of the replay (engine/_restore)
                      run with hooks that catch; batch norms leave their statistics alone
                      compare what was saved and returned with the first run
                      fill Saved.tensors
                    stream - residual, in place if nothing else sees the memory
                    observers: is the rebuilt stream near enough?
                autograd takes the tensors of i one by one, and differentiates function i

What is rare is elsewhere: random numbers and tensors from elsewhere in `_careful`, state in buffers in `_states`,
putting back in `_restore`, retained graphs and keyframes in `_retained`, other couplings in `_step`, other observers
in `_observers`, a suspicious result in `_suspicion`, and the parts of a stream, in one run of sixteen, in `_parts`.

NOTE [ Rules ]

The code cites these by number.

 1. *The graph owns the run.* Slots refer to their `Saved`, a `Saved` to its run; the run refers to a `Saved` weakly.
    Nothing else keeps a run, so it goes with the graph. Whatever a run keeps must not lead back to the graph that owns
    it: not the caller's log-determinants, not a residual that still has its node. Pack hooks live as long as the nodes
    that they made, so a list that a hook appends to is cleared when the function is done: the cycle would go through
    C++, where no collector sees it.
 2. *A slot gives its tensor away.* Reading a slot clears it, so that a tensor is freed as soon as autograd has used it.
    A slot that is read twice (a retained graph) is rebuilt for the second time.
 3. *One function's activations at a time.* Before a function's slots are filled, the last function's are
    emptied, whether they were read or not.
 4. *What must be equal in both runs* is the function's structure, parameters, buffers, arguments, training flags,
    `requires_grad` flags, autocast and random numbers. Each is looked at before a replay, cheaply. What can be put back
    is put back, and left as it was found: flags, autocast, random states, the tensors that were swapped out
    (`functional_call`), and copies of buffers as they were before the function changed them. What cannot, because it
    was modified in place, raises. Tensors are known by themselves, held by a reference, and never by an address.
 5. *What is never written to*: the caller's tensors, what is held while the graph is retained, and any memory that
    another tensor sees. A stream is written over only by the one who alone refers to its storage.
 6. *Retained graphs walk on a fork.* The held streams move only when nothing above can be asked for again. Otherwise
    the walk is a copy of references, dropped when the backward pass ends.
 7. *A second run may stop early* once every slot is filled, if its result is not needed: at the lowest half-block, and
    wherever inputs are kept. It stops by an exception that user code does not catch.
 8. *A wrong answer raises.* Another number of saved tensors, another shape, a changed version, other random numbers, an
    output that was written over, a result that is off by far more than its input: each is a `ReconstructionError` (or
    the error that autograd would raise), never another gradient. Rounding that was amplified is not wrong; it warns.

NOTE [ Traps ]

Each of these was a bug once, or a slow step.

 - A pack hook of a second run returns nothing. A node that got its own output back would keep itself alive.
 - A second run reads `stream.data`, whose version is its own. `detach` shares the stream's version, which goes up when
   the stream is written over, and each saved input would look as if it had been written to.
 - A plan holds no tensor. It knows tensors by `id` only while a call holds them; under `functional_call`, FSDP and
   weight norm they are new in each step.
 - Whether a tensor comes from elsewhere shows in its reference count, so no variable may refer to it while it is asked.
 - What looks cheap alone costs two to five times as much between kernels, where it finds no cache warm; NumPy, once in
   a run, costs more than a check of every function. `revnet bench --host` measures, and `tests/contracts/test_host.py`
   counts.

Where to put what comes next. A coupling that keeps bits besides the stream: its step keeps them (`AbstractStep`).
Streams that come back from outside, as in a pipeline: `Rebuilder.hold` is the one place where a run gets its streams,
and may be called again. Holding the stream that one function reads: a keyframe before it. Keeping outputs of operators:
a mode around the call in `_replay`, with what it keeps in `Saved`.

Names that `revnet` itself does not export are provisional: they may change in any release.

References:
    Gomez et al. (2017), The Reversible Residual Network, Algorithm 1.
"""

from revnet.engine._batch_norm import normalizes_as_batch_norm as normalizes_as_batch_norm
from revnet.engine._block_hooks import block_calls as block_calls
from revnet.engine._block_hooks import call_within as call_within
from revnet.engine._chain import BoundChain as BoundChain
from revnet.engine._chain import Chain as Chain
from revnet.engine._chain import HalfBlock as HalfBlock
from revnet.engine._chain import stored as stored
from revnet.engine._checkpoint import checkpointed as checkpointed
from revnet.engine._checkpoint import checkpointed_call as checkpointed_call
from revnet.engine._determinism import Repetition as Repetition
from revnet.engine._determinism import repeat_function as repeat_function
from revnet.engine._drift import DriftMeter as DriftMeter
from revnet.engine._drift import DriftRecord as DriftRecord
from revnet.engine._inverse import inverse as inverse
from revnet.engine._offload import offloaded as offloaded
from revnet.engine._offload import offloaded_call as offloaded_call
from revnet.engine._rebuild import reversible as reversible
from revnet.engine._split import split as split
from revnet.engine._streams import begin as begin
from revnet.engine._streams import joined as joined
from revnet.engine._tolerance import ToleranceKeeper as ToleranceKeeper
from revnet.engine._tracing import refuse as refuse
from revnet.engine._tracing import runs_plainly as runs_plainly
