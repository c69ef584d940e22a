"""Pass wrong arguments to the public functions and constructors, one at a time, and judge the outcome.

`python -m tests.contracts.wrong_arguments` prints the judgments as JSON lines. A run takes all of `TARGETS`, every
argument of each, and every value of `WRONG`; `--quick` takes a few values. It limits its memory and the time of a call.

A judgment is one of

* right: an error of revnet, in one line, that names the argument; or a result, where the annotation allows the value
* accepted: a result, though the annotation does not allow the value
* nameless: an error of revnet, or within its code, that does not name the argument
* several lines: an error of revnet that is longer than one line
* foreign: an error that another package raised, in its own words
* endless: a call that took longer than `LIMIT_SECONDS`, or killed the process
"""

import collections.abc
import faulthandler
import inspect
import json
import math
import re
import resource
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import revnet
from revnet import conversion, coupling, distributed, functional, models, optim
from revnet import nn as rnn
from revnet.coupling._additive import additive, additive_inverse
from revnet.engine._split import split
from revnet.models._registry import _ENTRIES
from revnet.nn import attention
from revnet.nn._restore import restoring_policies, restoring_state
from revnet.nn._whole_model import policy_holders
from revnet.nn.policies._has_policies import as_policy, broadcast_policy

LIMIT_SECONDS = 10.0
LIMIT_BYTES = 4 * 2**30
"""Memory that a run may use in addition to its imports."""

WRONG: dict[str, Callable[[], Any]] = {
    "'x'": lambda: "x",
    "''": lambda: "",
    "b'x'": lambda: b"x",
    "None": lambda: None,
    "a module": nn.ReLU,
    "a class": lambda: nn.ReLU,
    "a function": lambda: torch.tanh,
    "an object": object,
    "-1": lambda: -1,
    "0": lambda: 0,
    "3": lambda: 3,
    "2.5": lambda: 2.5,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "1j": lambda: 1j,
    "True": lambda: True,
    "10**9": lambda: 10**9,
    "10**30": lambda: 10**30,
    "10**5000": lambda: 10**5000,
    "[]": list,
    "[1, 'x']": lambda: [1, "x"],
    "{}": dict,
    "{'a': 1}": lambda: {"a": 1},
    "(10**9,) * 3": lambda: (10**9,) * 3,
    "an iterator": lambda: iter([1]),
    "a tensor": lambda: torch.zeros(2),
    "a tensor of integers": lambda: torch.zeros(1, 4, 8, 8, dtype=torch.int64),
}
QUICK = ("'x'", "None", "a module", "-1", "10**9", "True")


@dataclass(frozen=True)
class Target:
    """A public function, class or method."""

    name: str
    call: Callable[..., Any]
    make_arguments: Callable[[], dict[str, Any]]
    """Valid arguments. The entry "*blocks" holds positional arguments."""
    signature: Any = None
    """Function with the parameters and annotations, if it is not `call`."""
    also: dict[str, str] = field(default_factory=dict)
    """Other names of an argument that an error may use."""
    silent: frozenset[str] = frozenset()
    """Arguments that are not tested, since only messages show them."""

    def parameters(self) -> dict[str, Any]:
        """Return the arguments to test, with their annotations."""
        function = self.signature or self.call
        function = function.__init__ if isinstance(function, type) else function
        hints = typing.get_type_hints(function)
        annotations = {}
        given = self.make_arguments()
        for name, parameter in inspect.signature(function).parameters.items():
            if name == "self" or name in self.silent or parameter.kind is parameter.VAR_KEYWORD:
                continue
            if parameter.kind is parameter.VAR_POSITIONAL:
                name = f"*{name}"
                if name not in given:
                    continue
            annotations[name] = hints.get(name.lstrip("*"), Any)
        return annotations

    def call_with(self, name: str, value: Any) -> Any:
        """Call with a wrong value for one argument, or for the first positional one."""
        arguments = self.make_arguments()
        starred = next((key for key in arguments if key.startswith("*")), None)
        positional = [] if starred is None else list(arguments.pop(starred))
        if name.startswith("*"):
            positional[0] = value
        else:
            arguments[name] = value
        result = self.call(*positional, **arguments)
        if isinstance(result, typing.ContextManager):
            with result:
                pass
        return result


# Valid arguments -------------------------------------------------------------------------------------------------


def linear() -> nn.Module:
    return nn.Linear(2, 2)


def block(**options: Any) -> revnet.ReversibleBlock:
    return revnet.ReversibleBlock(linear(), linear(), **options)


def sequence() -> revnet.ReversibleSequential:
    return revnet.ReversibleSequential(block(), block())


def images(*shape: int) -> Tensor:
    return torch.rand(shape or (1, 4, 8, 8))


def heads() -> Tensor:
    return torch.randn(1, 2, 8, 4)


def on_meta(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a small version, since published sizes are too large to build thousands of times."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.device("meta"):
            return function(*args, **kwargs)

    return call


HIGHWAY = {"num_layers": (1, 1), "width": 4, "gate_bias": -2, "num_classes": 2}
RESNET = {"num_blocks": (1, 1), "widths": (4, 4, 8), "num_classes": 2}
VIT = {"img_size": 8, "patch_size": 4, "dim": 8, "depth": 1, "num_heads": 2, "num_classes": 2}
TRANSFORMER = {"vocab_size": 10, "dim": 8, "depth": 1, "num_heads": 2, "max_length": 16}
ENCODER_DECODER = {"vocab_size": 10, "dim": 8, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2}
UNET = {"in_channels": 2, "widths": (4, 8)}
NICE = {"image_shape": (1, 4, 4), "num_couplings": 2, "hidden_dim": 4, "num_hidden": 1}
GLOW = {"image_shape": (1, 4, 4), "num_scales": 1, "num_steps": 1, "hidden_dim": 4}
REALNVP = {"image_shape": (1, 4, 4), "num_scales": 1, "num_couplings": 1, "hidden_dim": 4, "num_blocks": 1}
IREVNET = {"num_blocks": (1, 1), "strides": (1, 2), "num_classes": 2}

CONSTRUCTORS: list[tuple[Any, dict[str, Any]]] = [
    (conversion.Adapter, {}),
    (conversion.BDIA, {}),
    (conversion.Consistent, {}),
    (conversion.ConversionSchedule, {"start": conversion.Rewire(), "end": conversion.Rewire(), "num_updates": 2}),
    (conversion.Dr2Net, {}),
    (conversion.Rewire, {}),
    (coupling.Additive, {}),
    (coupling.Affine, {}),
    (coupling.BDIA, {}),
    (coupling.ExactScaled, {"scaled": coupling.Scaled()}),
    (coupling.FixedPoint, {}),
    (coupling.Momentum, {}),
    (coupling.Scaled, {}),
    (rnn.BatchNorm2dBiased, {"num_features": 4}),
    (rnn.BatchNorm2dUnbiased, {"num_features": 4}),
    (rnn.ReversibleBlock, {"f": linear(), "g": linear()}),
    (rnn.CrossEntropyHead, {"in_features": 4, "num_classes": 6}),
    (rnn.Conv2dSame, {"in_channels": 4, "out_channels": 2, "kernel_size": 3}),
    (rnn.CouplingLayer, {"f": linear()}),
    (rnn.HaarWavelet, {}),
    (rnn.ActNorm, {"num_channels": 4}),
    (rnn.FlowStep, {"f": linear(), "num_channels": 4}),
    (rnn.MultiScaleSequential, {"*scales": [rnn.SpaceToDepth(), rnn.HaarWavelet()]}),
    (rnn.InvertibleConv1x1, {"num_channels": 4}),
    (rnn.InvertibleSequential, {"*layers": [rnn.SpaceToDepth(), block()]}),
    (rnn.LeapfrogBlock, {"f": linear()}),
    (rnn.MomentumBlock, {"f": linear()}),
    (rnn.MultiStreamBlock, {"*functions": [linear(), linear(), linear()]}),
    (rnn.DuplicateStreams, {}),
    (rnn.JoinStreams, {}),
    (rnn.GroupedBlock, {"*functions": [linear(), linear(), linear()]}),
    (rnn.ChannelPermutation, {"num_channels": 4}),
    (rnn.Checkpoint, {}),
    (rnn.Offload, {}),
    (rnn.Reverse, {"hold": "f", "keep": "linear"}),
    (rnn.Store, {}),
    (rnn.PolicySequential, {"*modules": [linear()]}),
    (rnn.ReversibleSequential, {"*blocks": [block(), block()]}),
    (rnn.SpaceToDepth, {}),
    (attention.CrossAttention, {"dim": 8, "num_heads": 2}),
    (attention.FullAttention, {"dim": 8, "num_heads": 2}),
    (attention.HierarchicalAttention, {"dim": 8, "num_heads": 2, "block_size": 4}),
    (attention.KeyValueCache, {"length": 4}),
    (attention.LSHAttention, {"dim": 8, "num_heads": 2, "bucket_size": 4}),
    (models.Highway, HIGHWAY),
    (models.ResNet, RESNET),
    (models.RevNet, RESNET),
    (models.IRevNet, IREVNET),
    (models.NICE, NICE),
    (models.Glow, GLOW),
    (models.RealNVP, REALNVP),
    (models.ReversibleViT, VIT),
    (models.ReversibleEncoderDecoder, ENCODER_DECODER),
    (models.ReversibleTransformer, TRANSFORMER),
    (models.UNet3d, UNET),
    (distributed.Pipeline, {"blocks": sequence(), "num_microbatches": 1}),
]
UNITS = sequence().policy_units


def converted() -> nn.Module:
    """Return a model whose blocks are converted."""
    model = nn.Sequential(linear(), linear())
    conversion.convert(model, conversion.Dr2Net())
    return model


def shard_arguments() -> dict[str, Any]:
    """Return arguments for sharding, in a process group in which only this process is real."""
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    return {"model": sequence()}


FUNCTIONS = [
    Target(
        "additive",
        additive,
        lambda: {"x": heads(), "residual": heads()},
        also={"x": "f", "residual": "f"},  # errors name the function that returned the residual
        silent=frozenset({"name"}),
    ),
    Target(
        "additive_inverse",
        additive_inverse,
        lambda: {"y": heads(), "residual": heads()},
        also={"y": "f", "residual": "f"},
        silent=frozenset({"name"}),
    ),
    Target("as_policy", as_policy, lambda: {"policy": "store"}, silent=frozenset({"name"})),
    Target("broadcast_policy", broadcast_policy, lambda: {"policy": "store", "units": UNITS}),
    Target("policy_holders", policy_holders, lambda: {"model": sequence()}),
    Target("restoring_policies", restoring_policies, lambda: {"model": sequence()}),
    Target("restoring_state", restoring_state, lambda: {"model": sequence()}),
    Target(
        "initialize_act_norms", rnn.initialize_act_norms, lambda: {"model": rnn.ActNorm(4)}, silent=frozenset({"args"})
    ),
    Target("add_policies", rnn.add_policies, lambda: {"model": nn.Sequential(linear()), "blocks": "0"}),
    Target("remove_policies", rnn.remove_policies, lambda: {"model": sequence()}),
    Target("set_coupling", rnn.set_coupling, lambda: {"model": sequence(), "coupling": coupling.FixedPoint()}),
    Target("set_policy", rnn.set_policy, lambda: {"model": sequence(), "policy": "store"}),
    Target("set_tolerance", rnn.set_tolerance, lambda: {"model": sequence(), "tolerance": 1e-3}),
    Target("shard_blocks", distributed.shard_blocks, shard_arguments),
    Target("synchronize_batch_norms", distributed.synchronize_batch_norms, lambda: {"model": sequence()}),
    Target("chunked", functional.chunked, lambda: {"module": linear(), "x": images(1, 4, 2), "num_chunks": 2}),
    Target("full_attention", functional.full_attention, lambda: {"q": heads(), "k": heads(), "v": heads()}),
    Target(
        "hierarchical_attention",
        functional.hierarchical_attention,
        lambda: {"q": heads(), "k": heads(), "v": heads(), "block_size": 2},
    ),
    Target(
        "linear_cross_entropy",
        functional.linear_cross_entropy,
        lambda: {"x": images(2, 4), "weight": images(6, 4), "targets": torch.zeros(2, dtype=torch.long)},
    ),
    Target("lsh_attention", functional.lsh_attention, lambda: {"qk": heads(), "v": heads(), "bucket_size": 2}),
    Target("rotary_table", functional.rotary_table, lambda: {"length": 8, "head_dim": 4}),
    Target("rotate", functional.rotate, lambda: {"x": heads(), "table": functional.rotary_table(8, 4)}),
    Target(
        "sliding_window_inference",
        functional.sliding_window_inference,
        lambda: {"model": nn.Identity(), "x": images(), "patch_size": 4},
    ),
    Target(
        "split",
        split,
        lambda: {"x": images(), "dim": 1},
        also={"dim": "split_dim"},  # the name of the argument of a block
        silent=frozenset({"name"}),
    ),
    Target(
        "convert",
        conversion.convert,
        lambda: {"model": nn.Sequential(nn.Sequential(linear(), linear())), "blocks": "0"},
    ),
    Target("set_method", conversion.set_method, lambda: {"model": converted(), "method": conversion.Rewire()}),
    Target("cut_into_stages", distributed.cut_into_stages, lambda: {"blocks": sequence(), "num_stages": 2}),
    Target("create_model", on_meta(models.create_model), lambda: {"name": "resnet32"}, models.create_model),
    Target("list_models", models.list_models, dict),
    Target("list_pretrained", models.list_pretrained, dict),
    Target("published_image_size", models.published_image_size, lambda: {"name": "resnet32"}),
    Target(
        "StepInBackward",
        optim.StepInBackward,
        lambda: {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))])},
    ),
    Target("register_model", models.register_model, lambda: {"image_size": 32}),
]
ENTRY_FUNCTIONS = [
    *models.list_models(),
    "reformer_enwik8",
    "h_transformer_small",
    "h_transformer_base",
    "h_transformer_large",
]

# An instance, and valid arguments of its methods by name.
IMAGES = {"x": images, "y": images}
FEATURES = {"x": lambda: images(2, 4), "y": lambda: images(2, 4)}
TOKENS = {"x": lambda: images(1, 4, 8)}
CLASSIFIER: dict[str, Callable[[], Any]] = {"x": lambda: images(1, 3, 8, 8), "num_classes": lambda: 2}
DENSITY: dict[str, Callable[[], Any]] = {
    "x": lambda: images(1, 1, 4, 4),
    "z": lambda: images(1, 16),
    "mask": lambda: torch.ones(4, 4),
    "log_prob": lambda: torch.zeros(1),
    "num_levels": lambda: 16,
    "num_samples": lambda: 1,
    "num_steps": lambda: 1,
}
INSTANCES: list[tuple[Callable[[], Any], dict[str, Callable[[], Any]]]] = [
    (partial(rnn.BatchNorm2dBiased, 4), IMAGES),
    (partial(rnn.BatchNorm2dUnbiased, 4), IMAGES),
    (partial(rnn.CrossEntropyHead, 4, 6), FEATURES),
    (partial(rnn.Conv2dSame, 4, 2, 3, 2), IMAGES),
    (rnn.HaarWavelet, IMAGES),
    (partial(rnn.InvertibleConv1x1, 4), IMAGES),
    (partial(rnn.ActNorm, 4), IMAGES),
    (lambda: rnn.FlowStep(linear(), num_channels=4, coupling=coupling.Additive()), FEATURES),
    (
        lambda: rnn.MultiScaleSequential(rnn.SpaceToDepth(), rnn.SpaceToDepth()),
        {**IMAGES, "codes": lambda: (images(1, 8, 2, 2), images(1, 32, 1, 1))},
    ),
    (partial(rnn.ChannelPermutation, 4), IMAGES),
    (rnn.SpaceToDepth, IMAGES),
    (
        lambda: rnn.InvertibleSequential(rnn.SpaceToDepth(), rnn.HaarWavelet()),
        {**IMAGES, "y": lambda: images(1, 16, 2, 2)},
    ),
    (block, FEATURES),
    (lambda: rnn.CouplingLayer(linear()), FEATURES),
    (lambda: rnn.LeapfrogBlock(linear()), FEATURES),
    (lambda: rnn.MomentumBlock(linear()), FEATURES),
    (lambda: rnn.MultiStreamBlock(linear(), linear()), FEATURES),
    (lambda: rnn.GroupedBlock(linear(), linear()), FEATURES),
    (rnn.DuplicateStreams, FEATURES),
    (rnn.JoinStreams, {"streams": lambda: (images(2, 4), images(2, 4))}),
    (sequence, {**FEATURES, "policy": revnet.Store}),
    (partial(attention.CrossAttention, 8, 2), {**TOKENS, "context": lambda: torch.randn(1, 5, 8)}),
    (partial(attention.FullAttention, 8, 2), TOKENS),
    (partial(attention.HierarchicalAttention, 8, 2, block_size=2), TOKENS),
    (partial(attention.LSHAttention, 8, 2, bucket_size=2), TOKENS),
    (partial(models.Highway, **HIGHWAY), CLASSIFIER),
    (partial(models.ResNet, **RESNET), CLASSIFIER),
    (partial(models.RevNet, **RESNET), CLASSIFIER),
    (partial(models.IRevNet, **IREVNET), {**CLASSIFIER, "y": lambda: images(1, 48, 2, 2)}),
    (partial(models.ReversibleViT, **VIT), CLASSIFIER),
    (partial(models.UNet3d, **UNET), {"x": lambda: images(1, 2, 4, 4, 4)}),
    *(
        (make, DENSITY)
        for make in (partial(models.NICE, **NICE), partial(models.Glow, **GLOW), partial(models.RealNVP, **REALNVP))
    ),
    (
        partial(models.ReversibleTransformer, **TRANSFORMER),
        {"tokens": lambda: torch.zeros(1, 4, dtype=torch.long), "num_new": lambda: 1, "x": lambda: images(1, 4, 16)},
    ),
    (
        partial(models.ReversibleEncoderDecoder, **ENCODER_DECODER),
        {
            "source": lambda: torch.zeros(1, 4, dtype=torch.long),
            "tokens": lambda: torch.zeros(1, 3, dtype=torch.long),
            "context": lambda: images(1, 4, 16),
            "num_new": lambda: 1,
            "start": lambda: 0,
        },
    ),
]
LEFT_OUT_METHODS = {
    "half_blocks": "its argument is shown in messages only",
    "restore_tolerance": "it takes what `tolerance_state` returned",
    "extra_repr": "no arguments",
    "save_pretrained": "it writes files; tests/models/test_pretrained.py",
    "push_to_hub": "it sends files; tests/models/test_hub.py",
}

LEFT_OUT = {
    **dict.fromkeys(
        [name for name in dir(functional) if name[0] != "_" and name not in {target.name for target in FUNCTIONS}],
        "part of the engine, which modules call with arguments that they have checked",
    ),
    **dict.fromkeys(
        [name for name in [*dir(rnn), *dir(coupling), *dir(models)] if name.startswith("Abstract")], "abstract"
    ),
    "PolicyUnit": "a record",
    "from_pretrained": "it would ask the hub for wrong names; tests/models/test_pretrained.py",
    "StageModule": "a result of `cut_into_stages`",
    "Traffic": "a record",
    "HasGradientCheckpointing": "abstract; the methods are tested with the models",
    "HasPolicies": "abstract",
    "HasSinglePolicy": "abstract",
}


def public_names() -> set[str]:
    """Return the names that the subpackages export."""
    rooms = (coupling, distributed, functional, rnn, attention, models, optim)
    return {
        name
        for room in rooms
        for name, value in vars(room).items()
        if name[0] != "_" and not isinstance(value, types.ModuleType)
    }


def _head_arguments(model: Any, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of methods, where `forward_head` reads features instead of images."""
    if name == "forward_head":
        arguments["x"] = images(1, model.num_features, 2, 2)
    return arguments


def _methods(make: Callable[[], Any], samples: dict[str, Callable[[], Any]]) -> Iterator[Target]:
    instance = make()
    for name in sorted(dir(type(instance))):
        function = inspect.getattr_static(type(instance), name)
        if name[0] == "_" or name in LEFT_OUT_METHODS or not inspect.isfunction(function):
            continue
        if not function.__module__.startswith("revnet."):
            continue
        required = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.name != "self"
        ]
        optional = [key for key in inspect.signature(function).parameters if key in ("num_steps",)]

        def arguments(required: list[str] = [*required, *optional], name: str = name) -> dict[str, Any]:  # noqa: B006
            return _head_arguments(instance, name, {key: samples[key]() for key in required})

        def call(name: str = name, **kwargs: Any) -> Any:
            own = make()
            return (own if name == "forward" else getattr(own, name))(**kwargs)

        # Copy the instance, which may be costly to build, so that calls do not change it.
        yield Target(f"{type(instance).__name__}.{name}", call, arguments, function)


def targets() -> list[Target]:
    """Return all functions, classes and methods to call."""
    result = [Target(cls.__name__, cls, lambda options=options: dict(options)) for cls, options in CONSTRUCTORS]
    result += FUNCTIONS
    for name in ENTRY_FUNCTIONS:
        function = getattr(models, name, None) or _ENTRIES[name].function
        result.append(Target(name, on_meta(function), dict, function))
    for make, samples in INSTANCES:
        result += _methods(make, samples)
    return result


# Judgments -------------------------------------------------------------------------------------------------------


def allows(annotation: Any, value: Any) -> bool:
    """Return whether a value has the annotated type. A bool is not a number."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, origin) and all(allows(inner[0], key) for key in value)
    if origin in (Union, types.UnionType):
        return any(allows(kind, value) for kind in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation in (int, float):
        kinds = (int,) if annotation is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(inner) == 2 and inner[1] is Ellipsis:
            return all(allows(inner[0], item) for item in value)
        return len(value) == len(inner) and all(map(allows, inner, value))
    if origin is collections.abc.Callable:
        return callable(value)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Sequence):
        return isinstance(value, origin) and not isinstance(value, str) and all(allows(inner[0], x) for x in value)
    if isinstance(annotation, type):
        return isinstance(value, annotation)
    raise NotImplementedError(f"teach `allows` about {annotation}")


class TooLongError(BaseException):
    """Raised if a call takes too long."""


def _stop(*_: Any) -> None:
    raise TooLongError


SOURCE = str(Path(revnet.__file__).parent)


def watch() -> None:
    """Set the handler that ends calls that take too long."""
    signal.signal(signal.SIGALRM, _stop)


def judge(target: Target, name: str, annotation: Any, value: Any) -> tuple[str, str]:
    """Return the judgment and the message."""
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    faulthandler.dump_traceback_later(4 * LIMIT_SECONDS, exit=True)  # a signal does not interrupt C code
    try:
        target.call_with(name, value)
    except TooLongError:
        return "endless", ""
    except Exception as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return _judge_error(target, name.lstrip("*"), error), f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    return ("right" if allows(annotation, value) else "accepted"), ""


def _judge_error(target: Target, name: str, error: Exception) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or not traceback.tb_frame.f_code.co_filename.startswith(SOURCE):
        return "foreign"
    names = "|".join(re.escape(alias) for alias in (name, target.also.get(name, name)))
    if not re.search(rf"`(\w+\.)?({names})\d?\b", str(error)):
        return "nameless"
    return "several lines" if "\n" in str(error) else "right"


def cases(quick: bool) -> Iterator[tuple[Target, str, Any, str]]:
    """Return all cases: a target, an argument with its annotation, and the name of a value."""
    for target in targets():
        for name, annotation in target.parameters().items():
            for label in QUICK if quick else WRONG:
                yield target, name, annotation, label


def main() -> None:
    """Judge all cases, starting with the given number."""
    quick, start = "--quick" in sys.argv, int(sys.argv[1])
    watch()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT_BYTES, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    for number, (target, name, annotation, label) in enumerate(cases(quick)):
        if number < start:
            continue
        place = f"{target.name}({name}={label})"
        print(json.dumps([number, place]), flush=True)  # shows which case kills the process
        torch.manual_seed(0)
        judgment, message = judge(target, name, annotation, WRONG[label]())
        print(json.dumps([number, place, judgment, message]), flush=True)


if __name__ == "__main__":
    main()
