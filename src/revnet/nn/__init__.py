"""Modules that hold residual functions and run them reversibly.

`blocks` holds the reversible blocks and the sequence that runs them, `policies` says what happens to activations,
`invertible` holds the layers of normalizing flows, and `attention` the attention layers. The functions `set_policy`,
`set_coupling` and `set_tolerance` change a whole model.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.nn._add_policies import add_policies as add_policies
from revnet.nn._add_policies import remove_policies as remove_policies
from revnet.nn._batch_norm import BatchNorm2dBiased as BatchNorm2dBiased
from revnet.nn._batch_norm import BatchNorm2dUnbiased as BatchNorm2dUnbiased
from revnet.nn._cross_entropy_head import CrossEntropyHead as CrossEntropyHead
from revnet.nn._tensorflow import Conv2dSame as Conv2dSame
from revnet.nn._whole_model import set_coupling as set_coupling
from revnet.nn._whole_model import set_policy as set_policy
from revnet.nn._whole_model import set_tolerance as set_tolerance
from revnet.nn.blocks._abstract_block import AbstractReversibleBlock as AbstractReversibleBlock
from revnet.nn.blocks._coupling_layer import CouplingLayer as CouplingLayer
from revnet.nn.blocks._grouped_block import GroupedBlock as GroupedBlock
from revnet.nn.blocks._leapfrog_block import LeapfrogBlock as LeapfrogBlock
from revnet.nn.blocks._momentum_block import MomentumBlock as MomentumBlock
from revnet.nn.blocks._multi_stream_block import MultiStreamBlock as MultiStreamBlock
from revnet.nn.blocks._reversible_block import ReversibleBlock as ReversibleBlock
from revnet.nn.blocks._reversible_sequential import ReversibleSequential as ReversibleSequential
from revnet.nn.blocks._stream_modules import DuplicateStreams as DuplicateStreams
from revnet.nn.blocks._stream_modules import JoinStreams as JoinStreams
from revnet.nn.invertible._abstract_invertible import AbstractInvertible as AbstractInvertible
from revnet.nn.invertible._act_norm import ActNorm as ActNorm
from revnet.nn.invertible._flow_step import FlowStep as FlowStep
from revnet.nn.invertible._haar import HaarWavelet as HaarWavelet
from revnet.nn.invertible._initialize_act_norms import initialize_act_norms as initialize_act_norms
from revnet.nn.invertible._invertible_conv import InvertibleConv1x1 as InvertibleConv1x1
from revnet.nn.invertible._invertible_sequential import InvertibleSequential as InvertibleSequential
from revnet.nn.invertible._multi_scale import MultiScaleSequential as MultiScaleSequential
from revnet.nn.invertible._permutation import ChannelPermutation as ChannelPermutation
from revnet.nn.invertible._space_to_depth import SpaceToDepth as SpaceToDepth
from revnet.nn.policies._has_gradient_checkpointing import HasGradientCheckpointing as HasGradientCheckpointing
from revnet.nn.policies._has_policies import HasPolicies as HasPolicies
from revnet.nn.policies._has_policies import HasSinglePolicy as HasSinglePolicy
from revnet.nn.policies._has_policies import PolicyUnit as PolicyUnit
from revnet.nn.policies._policy import AbstractModulePolicy as AbstractModulePolicy
from revnet.nn.policies._policy import AbstractPolicy as AbstractPolicy
from revnet.nn.policies._policy import Checkpoint as Checkpoint
from revnet.nn.policies._policy import Offload as Offload
from revnet.nn.policies._policy import Reverse as Reverse
from revnet.nn.policies._policy import Store as Store
from revnet.nn.policies._policy_sequential import PolicySequential as PolicySequential
