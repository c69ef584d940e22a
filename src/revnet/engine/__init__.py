"""The engine: reversible execution on the ordinary autograd graph.

A chain of half-blocks, `y = x + f(other stream)`, runs forward as usual, but under saved-tensor hooks that keep none of
the tensors that autograd wants to save. Only the final streams are held. When the backward pass first asks for a saved
tensor of a half-block, the engine walks the streams back to that half-block. On the way it calls each residual function
again on the stream that the function read, under hooks that collect the tensors that autograd now saves, and subtracts
the result from the stream that the half-block updated. This is `torch.utils.checkpoint(use_reentrant=False)`, except
that the inputs are rebuilt instead of stored. Because the graph is the ordinary one, hooks, partial gradients, retained
graphs and double backward behave as they always do.

A policy calls one of `reversible`, `stored`, `checkpointed` and `offloaded`. They all take a `BoundChain` and the
streams, and return the streams.

NOTE [ Who refers to whom ]

In this diagram `-->` is a reference and `~>` is a weak reference. Each forward pass through a chain has one `Rebuilder`
(the *run*), with one step for each half-block. Each step for which autograd saved a tensor has one `Saved`. ::

    autograd graph of one forward pass             objects that outlive the pass

      node  --> slot: a number                       ReversibleSequential
            --> hook, bound to the Saved               |
                  |                                    +--> Chain          half-blocks, collected once
                  v                                           +--> Plan    structure of each function
                Saved --> tensors, while they are filled                   (holds no tensor)
                  |   --> others: parameters and buffers
                  |   --> constants: tensors from outside the function
                  v
      run:  Rebuilder --> held: StreamSnapshot       final streams; walked back in place
                  |   --> walk: StreamSnapshot       a fork of them, while the graph is retained
                  |   --> keyframes                  streams held in between, under a tolerance
                  |   --> observers                  agreement, drift, tolerance, range
                  |   --> surroundings               shared by its calls: devices, random states, and the arguments,
                  |                                  of which each replay gets new leaves (`_arguments`)
                  v
                steps: AdditiveStep | JoinedStep     each is a RecordedCall
                  |   --> parameters, buffers: the tensors themselves
                  |   --> versions, random states, copies of the buffers that the function changes
                  |   --> held_before                the stream that it updates, if the run holds it
                  |   --> keepers                    statistics and outputs of the first run, for the replay
                  +~> Saved

A *slot* is the value that the pack hook returns. Numbers from 0 up refer to tensors that are rebuilt. Negative numbers
refer to tensors that outlive the call anyway; `Saved` keeps these, with the versions that they had.

NOTE [ One training step ]

The calls of a step, and the files that define them. A plain step runs through these seven files and no others; a test
checks this. ::

    forward   ReversibleModule.forward                nn/_reversible_module
                reuse the chains of the last call if the modules are the same
                split the input into streams          engine/_streams
                Reverse().run = reversible            engine/_rebuild
                  Rebuilder.run
                    for each half-block: step.first
                      RecordedCall                    engine/_record
                        check that the function still fits its plan; look up the tensors that it holds
                      record
                        push hooks, call the function, pop hooks
                        compare random states and versions: did it draw or write?
                        drop the tensors that autograd saved; note their shapes and dtypes
                      stream + residual
                      observers: digest the stream    engine/_agreement, engine/_digest
                join the streams                      engine/_streams
                  hold the final streams, or views of the joined output

    backward  autograd asks a slot of half-block i    Saved.unpack in engine/_record
                Rebuilder.rebuild(i)                  engine/_rebuild
                  observers: are the held streams unchanged?
                  for each half-block above i that is not yet undone: step.undo, without filling its slots
                  step.undo of i, filling its slots
                    observers: is the rebuilt source close enough?
                    replay                            engine/_replay
                      are versions, and everything else that the function depends on, unchanged?
                        if not, `restored` puts them back for the replay (engine/_restore)
                      call the function under hooks that collect; batch norms leave their statistics alone
                      compare what was saved and returned with the first run
                      fill Saved.tensors
                    stream - residual, in place if nothing else sees the memory
                    observers: is the rebuilt stream close enough?
                autograd takes the tensors of i one by one, and differentiates function i

`record` runs chains whose output is not held (`_recording`), and `Recording.backward` takes the output back.

Rare cases have files of their own: streams that are held and outputs that are kept, by the arguments of `Reverse`
(`_moves`, `_keep`), statistics of batch norms on large inputs (`_batch_norm`), random numbers and tensors from outside
the function (`_careful`; functions of known modules have neither, see `_self_contained`), state in buffers (`_states`),
restoring state (`_restore`), retained graphs and keyframes (`_retained`), couplings other than the additive ones
(`_step`), additional observers (`_observers`), a suspicious result (`_suspicion`), the parts of a stream, which one run
in sixteen compares (`_parts`), and CUDA graphs, whose runs read nothing from the device (`_capture`). Copies to host
memory are in `_offload`, and in `_transfers` if they overlap with computation.

NOTE [ Rules ]

The code cites these rules by number.

 1. *The graph owns the run.* Slots refer to their `Saved`, and a `Saved` refers to its run. The run refers to each
    `Saved` weakly, and nothing else keeps the run alive, so it is freed with the graph. Nothing that a run keeps may
    lead back to the graph: not the caller's log-determinants, and not a residual that still has its node. A pack hook
    lives as long as the nodes that were created under it, so a list that a hook appends to is cleared when the function
    returns. Otherwise a reference cycle would go through C++, where the garbage collector cannot see it.
 2. *A slot gives its tensor away.* Reading a slot clears it, so that the tensor is freed as soon as autograd has used
    it. A slot that is read twice (in a retained graph) is rebuilt a second time.
 3. *One function's activations at a time.* Before the slots of a function are filled, the slots of the previous
    function are emptied, even if they were never read.
 4. *Both runs must be equal* in the function's structure, parameters, buffers, arguments, training flags,
    `requires_grad` flags, autocast state and random numbers. A replay first checks each of them cheaply. State that can
    be restored is restored for the replay, and afterwards set to its current value again: flags, autocast, random
    states, tensors that were swapped out (`functional_call`), and copies of the buffers that the function changes. A
    tensor that was modified in place cannot be restored, so it raises. A tensor is identified by the object, which a
    reference keeps alive, and never by its address.
 5. *Never written to:* the caller's tensors, streams that are held while the graph is retained, and memory that another
    tensor sees. A stream is overwritten only if nothing else refers to its storage.
 6. *Retained graphs walk on a fork.* The held streams are walked back only if no half-block above can be asked for
    again. Otherwise the run walks back a fork, which shares their memory and is dropped after the backward pass.
 7. *A replay may stop early,* once every slot is filled, if its result is not needed: at the lowest half-block, and
    where inputs are kept. It stops by raising an exception that user code does not catch.
 8. *A wrong answer raises.* A different number of saved tensors, a different shape, a changed version, different random
    numbers, an overwritten output, or a result that is off by far more than its input: each raises a
    `ReconstructionError` (or the error that autograd would raise) and never gives a different gradient. Amplified
    rounding is not an error; it warns.

NOTE [ Traps ]

Each of these was once a bug or a slow step.

 - The pack hook of a replay returns None. If it returned the tensor, a node would hold its own output and stay alive.
 - A replay reads `stream.data`, which has a version counter of its own. `detach` shares the stream's counter, which
   rises when the stream is overwritten; every saved input would then look modified.
 - A plan holds no tensor. It compares tensors by `id`, and only while a call holds them. Under `functional_call`, FSDP
   and weight norm, the tensors are new in each step.
 - The reference count shows whether a tensor comes from outside the function. No local variable may refer to the tensor
   while the count is read.
 - An operation that looks cheap in isolation takes two to five times as long between kernels, where caches are cold.
   Calling NumPy once per run costs more than checking every function. `revnet bench --host` measures this, and
   `tests/contracts/test_host.py` counts calls.

NOTE [ Where to add things ]

 - A coupling that keeps bits in addition to the stream: its step keeps them (`AbstractStep`).
 - Streams that come back from outside, as in a pipeline: `_recording`. `RecordedRun.take_back` gives a run its streams.
 - Something else to keep from the first run of a function for its replay: a keeper (`_keeper`).
 - A class of modules whose functions need fewer checks: `self_contained`.

Names that `revnet` itself does not export are provisional: they may change in any release.

References:
    Gomez et al. (2017), The Reversible Residual Network, Algorithm 1.
"""

from revnet.engine._batch_norm import normalizes_as_batch_norm as normalizes_as_batch_norm
from revnet.engine._chain import BoundChain as BoundChain
from revnet.engine._chain import Chain as Chain
from revnet.engine._chain import HalfBlock as HalfBlock
from revnet.engine._chain import stored as stored
from revnet.engine._checkpoint import checkpointed as checkpointed
from revnet.engine._drift import DriftMeter as DriftMeter
from revnet.engine._inverse import inverse as inverse
from revnet.engine._offload import offloaded as offloaded
from revnet.engine._rebuild import reversible as reversible
from revnet.engine._recording import Recording as Recording
from revnet.engine._recording import record as record
