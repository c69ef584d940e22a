"""A `PreTrainedModel` of transformers switches the sequences inside it."""

import pytest
import torch
from torch import nn

from revnet import Reverse, ReversibleBlock, ReversibleSequential, Store

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def make_model():
    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig
        supports_gradient_checkpointing = True
        main_input_name = "x"

        def __init__(self, config):
            super().__init__(config)
            blocks = [ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)]
            self.blocks = ReversibleSequential(*blocks, policy="store")
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, x):
            return self.blocks(x)

    return Model(transformers.PretrainedConfig())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer versions have new names
def test_switches_of_a_pretrained_model_set_policies():
    model = make_model()
    model.gradient_checkpointing_enable()
    assert set(model.blocks.policies) == {Reverse()}
    assert model.is_gradient_checkpointing
    model(torch.randn(3, 4)).sum().backward()
    model.gradient_checkpointing_disable()
    assert set(model.blocks.policies) == {Store()}
    assert not model.is_gradient_checkpointing
