import pytest
import torch
from torch import nn

from revnet.data import ImageDataset, ImageSplit
from revnet.training import EvaluateResult, evaluate
from revnet.training.evaluation import count_errors


class SayPixel(nn.Module):
    """Answer with the first pixel of the image."""

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 3)


def test_errors_are_counted_over_all_batches():
    labels = torch.arange(1200) % 3
    images = labels.to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    images[[0, 700, 1199]] = 2 - images[[0, 700, 1199]] // 2
    wrong = int((images[:, 0, 0, 0] != labels).sum())
    assert wrong > 0
    assert count_errors(SayPixel(), ImageSplit(images, labels), torch.device("cpu")) == wrong


def test_the_report_has_accuracy_error_and_count():
    result = EvaluateResult(model="revnet38", data="digits", num_images=10_000, num_errors=1_234)
    assert (result.accuracy, result.error) == (0.8766, 0.1234)
    assert result.report() == "87.66 % (error 12.34 %, 1,234 of 10,000 wrong)"


def test_data_of_another_shape_are_refused(finished, monkeypatch):
    split = ImageSplit(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.arange(3))
    colours = ImageDataset("colours", split, split, ("red", "green", "blue"))
    monkeypatch.setattr("revnet.training.evaluation.load_dataset", lambda name: colours)
    with pytest.raises(
        ValueError, match=r"`data` \(='colours'\) has 3x8x8 images of 3 classes, but .* 1x8x8 images of 10"
    ):
        evaluate(finished.folder, "colours")
