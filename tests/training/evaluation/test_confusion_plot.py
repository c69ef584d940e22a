import matplotlib.image
import pytest
import torch

from revnet.training.evaluation.confusion import Confusion
from revnet.training.evaluation.confusion_plot import plot_confusion

RIGHT = 50 * torch.eye(130, dtype=torch.int64)
MIXED = RIGHT + torch.arange(130 * 130).view(130, 130) % 61 // 60


def some_classes(counts, used):
    return counts.where(torch.arange(len(counts))[:, None] < used, 0)


@pytest.mark.parametrize(
    "counts",
    [
        MIXED[:1, :1],
        torch.tensor([[0, 3], [1, 0]]),
        RIGHT[:3, :3],
        MIXED[:10, :10],
        MIXED[:22, :22],
        MIXED,
        RIGHT,
        some_classes(MIXED, used=5),
        10**6 * MIXED[:12, :12],
    ],
    ids=["one class", "all wrong", "all right", "numbers", "names", "dots", "no dots", "answers outside", "millions"],
)
def test_draws_every_kind_of_confusion(tmp_path, counts):
    names = [f"class {number} with a name that is far too long" for number in range(len(counts))]
    plot_confusion(Confusion(counts, names), tmp_path / "confusion.png", "a model on some data")
    picture = matplotlib.image.imread(tmp_path / "confusion.png")
    height, width, _ = picture.shape
    assert 400 < height < width < 2500
    assert picture.std() > 0.05  # something is drawn
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]


def test_draws_only_classes_with_images(tmp_path):
    pictures = []
    for counts in (some_classes(RIGHT, used=5), RIGHT[:5, :5]):
        names = [str(number) for number in range(len(counts))]
        plot_confusion(Confusion(counts, names), tmp_path / "confusion.png", "title")
        pictures.append((tmp_path / "confusion.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_names_may_hold_any_character(tmp_path):
    names = ["$5 and $10", "\\frac{", "a_b^c", "\u732b", "&<>"]
    plot_confusion(Confusion(MIXED[:5, :5], names), tmp_path / "confusion.png", "$ and $^$")
    assert (tmp_path / "confusion.png").stat().st_size > 0
