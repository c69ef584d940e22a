"""Policies as plain values: each policy returns, and what a stranger writes is checked."""

import json

import pytest
import torch

from revnet import Checkpoint, Offload, Reverse, Store
from revnet.nn.policies._plain_policy import describe_policy, read_policy

PLAIN = {
    "reverse": Reverse(),
    "checkpoint": Checkpoint(),
    "offload": Offload(),
    "store": Store(),
    '{"name": "offload", "overlap": true}': Offload(overlap=True),
    '{"name": "reverse", "hold": true}': Reverse(hold=True),
    '{"name": "reverse", "hold": ["f"], "keep": ["g.linear.0"]}': Reverse(hold="f", keep="g.linear.0"),
    '{"name": "reverse", "keep": "64MiB"}': Reverse(keep="64MiB"),
    '{"name": "reverse", "keep": 65536}': Reverse(keep=65536),
}


@pytest.mark.parametrize(("text", "policy"), PLAIN.items(), ids=PLAIN.keys())
def test_each_policy_returns_from_json(text, policy):
    value = describe_policy(policy)
    assert (value if isinstance(value, str) else json.dumps(value)) == text
    assert read_policy(json.loads(json.dumps(value))) == policy


class Own(Store):
    """A policy of a user."""


@pytest.mark.parametrize(
    "policy", [Own(), Reverse(keep=torch.ops.aten.mm), Reverse(keep=("linear", torch.ops.aten.mm)), Reverse(keep=len)]
)
def test_leaves_out_what_only_python_can_express(policy):
    assert describe_policy(policy) is None


@pytest.mark.parametrize(
    "value", ["magic", None, 3, [], {}, {"hold": "f"}, {"name": ["store"]}, {"name": "reverse", "keep": 0.5}]
)
def test_rejects_other_values(value):
    with pytest.raises(ValueError, match="must name one of reverse, checkpoint, offload, store") as caught:
        read_policy(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [{"name": "store", "hold": "f"}, {"name": "offload", "overlap": "yes"}])
def test_rejects_other_arguments(value):
    with pytest.raises(TypeError, match=r"hold|overlap"):
        read_policy(value)
