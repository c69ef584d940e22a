import csv

import pytest
import torch

from revnet.training.evaluation.confusion import ClassErrors, Confusion

NAMES = ("cat", "dog", "frog", "newt")
COUNTS = torch.tensor([[5, 2, 0, 1], [3, 7, 0, 0], [0, 0, 0, 0], [1, 2, 0, 0]])


def test_counts_images_and_errors():
    confusion = Confusion(COUNTS, NAMES)
    assert (confusion.num_images, confusion.num_errors) == (21, 9)
    assert repr(confusion) == "Confusion(num_classes=4, num_images=21)"


def test_omits_classes_without_images():
    rows = Confusion(COUNTS, NAMES).per_class()
    assert rows == [ClassErrors("cat", 8, 3), ClassErrors("dog", 10, 3), ClassErrors("newt", 3, 3)]
    assert [row.error for row in rows] == [0.375, 0.3, 1.0]


def test_sorts_mistakes_by_count_then_class():
    confusion = Confusion(COUNTS, NAMES)
    assert confusion.mistakes(3) == [("dog", "cat", 3), ("cat", "dog", 2), ("newt", "dog", 2)]
    assert [mistake.num_images for mistake in confusion.mistakes(100)] == [3, 2, 2, 1, 1]  # only mistakes that occurred
    assert Confusion(torch.eye(4, dtype=torch.int64), NAMES).mistakes(3) == []


def test_table_has_errors_and_answers_of_every_class(tmp_path):
    Confusion(COUNTS, ("cat", "dog, any", "frog", "été")).save_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        heading, *rows = csv.reader(file)
    assert heading == ["class", "images", "errors", "error", "as cat", "as dog, any", "as frog", "as été"]
    assert rows == [
        ["cat", "8", "3", "0.375", "5", "2", "0", "1"],
        ["dog, any", "10", "3", "0.3", "3", "7", "0", "0"],
        ["été", "3", "3", "1.0", "1", "2", "0", "0"],
    ]


def test_confusions_compare_counts_and_names():
    confusion = Confusion(COUNTS, NAMES)
    assert confusion == Confusion(COUNTS.clone(), list(NAMES))
    assert hash(confusion) == hash(Confusion(COUNTS.clone(), list(NAMES)))
    assert confusion != Confusion(COUNTS + 1, NAMES)
    assert confusion != Confusion(COUNTS, NAMES[::-1])
    assert confusion != 3


@pytest.mark.parametrize("counts", [COUNTS[:3], COUNTS.float()])
def test_rejects_invalid_counts(counts):
    with pytest.raises(ValueError, match=r"`counts` \(of shape .*\) must be int64 with a row and a column for each"):
        Confusion(counts, NAMES)
