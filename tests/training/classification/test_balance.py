from types import SimpleNamespace

import pytest
import torch

from revnet.training import TrainConfig
from revnet.training.classification.balance import class_weights, sampling_weights


class Training:
    labels = torch.tensor([0, 0, 0, 1])

    def __len__(self):
        return 4


class Stream:
    labels = None


DATASET = SimpleNamespace(num_classes=3, class_names=("a", "b", "c"))


def test_balanced_weights_are_inverse_to_the_counts():
    weights = class_weights(TrainConfig(class_weights="balanced"), Training(), DATASET)
    assert float(weights[0]) == pytest.approx(4 / (2 * 3))
    assert float(weights[1]) == pytest.approx(4 / 2)
    assert float(weights[Training.labels].mean()) == pytest.approx(1)


def test_weights_may_be_given():
    assert class_weights(TrainConfig(class_weights=[1, 2, 0]), Training(), DATASET).tolist() == [1, 2, 0]


def test_rare_images_are_drawn_more_often():
    weights = sampling_weights(TrainConfig(balanced_sampling=True), Training())
    assert weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])


@pytest.mark.parametrize(
    ("settings", "training", "message"),
    [
        ({"class_weights": [1, 2]}, Training(), r"`class_weights` \(=\[1, 2\]\) must be 3 numbers, one for each class"),
        ({"class_weights": "balanced"}, Stream(), r"`class_weights` needs the classes of all images in advance"),
        ({"balanced_sampling": True}, Stream(), r"`balanced_sampling` needs the classes of all images in advance"),
    ],
)
def test_rejects_what_cannot_be_weighed(settings, training, message):
    config = TrainConfig(**settings)

    def weigh():
        return class_weights(config, training, DATASET), sampling_weights(config, training)

    with pytest.raises(ValueError, match=message):
        weigh()


@pytest.mark.parametrize("weights", ["even", [1, -1], [0, 0], 3, [float("inf")]])
def test_rejects_invalid_class_weights(weights):
    with pytest.raises(
        ValueError, match=r"`class_weights` .* must be `balanced`, or a list of weights that are 0 or more"
    ):
        TrainConfig(class_weights=weights)


def test_rejects_both_kinds_of_balance():
    with pytest.raises(ValueError, match=r"both make up for rare classes; leave one of the two out"):
        TrainConfig(class_weights="balanced", balanced_sampling=True)
