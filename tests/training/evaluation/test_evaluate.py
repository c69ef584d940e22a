import logging
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from revnet.data import load_dataset
from revnet.errors import CheckpointError, DataError
from revnet.training import evaluate, load_classifier, predict_images
from revnet.training.evaluation.evaluate import evaluate_on, usual_batch_size
from tests.training.samples import (
    SayPixels,
    make_dataset,
    make_header,
    newest_checkpoint,
    save_checkpoint,
    write_image_folder,
)

CPU = torch.device("cpu")
LETTERS = tuple("abcdefg")


def run(answers, labels, class_names, *, known=None, **options):
    known = class_names if known is None else known
    header = make_header(known, image_shape=(1, 1, answers.shape[1]))
    return evaluate_on(make_dataset(answers, labels, class_names), SayPixels(header), CPU, **options)


def test_figures_do_not_depend_on_the_batch_size():
    answers, labels = torch.rand(1203, 7) * 8, torch.randint(7, (1203,))
    logits = answers.to(torch.uint8).float()
    result = run(answers, labels, LETTERS)
    assert (result.model, result.data, result.device) == ("resnet32", "pets", "cpu")
    expected = torch.bincount(7 * labels + logits.argmax(1), minlength=49).view(7, 7)
    assert torch.equal(result.confusion.counts, expected)
    assert result.num_images == 1203
    assert result.num_errors == (logits.argmax(1) != labels).sum()
    assert result.cross_entropy == pytest.approx(float(F.cross_entropy(logits.double(), labels)))
    for batch_size in (1, 1202, 5000):
        again = run(answers, labels, LETTERS, batch_size=batch_size)
        assert replace(again, cross_entropy=result.cross_entropy) == result
        assert again.cross_entropy == pytest.approx(result.cross_entropy)


def test_top5_error_needs_more_than_five_classes():
    labels = torch.arange(7)
    answers = torch.arange(7).expand(7, 7)  # the best answer is the last class, the two worst are the first
    assert run(answers, labels, LETTERS).num_top5_errors == 2
    assert run(answers[:5, :5], labels[:5], LETTERS[:5]).num_top5_errors is None


def test_matches_classes_by_name():
    answers = torch.tensor([[0, 9, 0], [0, 0, 9], [9, 0, 0], [0, 0, 9]])  # dog, frog, cat, frog
    same = run(answers, torch.tensor([1, 2, 0, 0]), ("cat", "dog", "frog"))
    turned = run(answers, torch.tensor([0, 1, 2, 2]), ("dog", "frog", "cat"), known=("cat", "dog", "frog"))
    assert turned == same
    assert (same.num_errors, same.confusion.mistakes(9)) == (1, [("cat", "frog", 1)])
    part = run(answers, torch.tensor([0, 1, 0, 1]), ("dog", "frog"), known=("cat", "dog", "frog"))
    assert part.confusion.mistakes(9) == [("dog", "cat", 1)]  # a class without data may still be answered
    assert [row.name for row in part.confusion.per_class()] == ["dog", "frog"]


def test_accepts_equal_names_in_the_same_order():
    answers = torch.tensor([[0, 9, 0], [0, 0, 9]])
    assert run(answers, torch.tensor([1, 2]), ("tank", "crane", "crane")).num_errors == 0


@pytest.mark.parametrize(
    ("class_names", "known", "message"),
    [
        (
            ("cat", "bird", "fish"),
            ("cat", "dog", "frog", "newt"),
            "`data` (='pets') has 'bird', 'fish' among its 3 classes, which the checkpoint does not know; its own 4 "
            "(pets) are 'cat', 'dog', 'frog' and 1 more. Pass data with these names.",
        ),
        (
            ("crane", "dog"),
            ("crane", "dog", "crane"),
            "cannot be matched by name, since two classes have the same name",
        ),
        (("dog", "dog", "cat"), ("cat", "dog"), "cannot be matched by name, since two classes have the same name"),
    ],
)
def test_rejects_classes_that_cannot_be_matched(class_names, known, message):
    with pytest.raises(ValueError, match=r"^`data`") as refused:
        run(torch.zeros(1, 4), torch.tensor([0]), class_names, known=known)
    assert message in str(refused.value)


def test_rejects_images_of_another_shape():
    classifier = SayPixels(make_header(image_shape=(3, 8, 8), data="cifar10"))
    dataset = make_dataset(torch.zeros(1, 3), torch.tensor([0]), ("cat", "dog", "frog"))
    message = (
        r"`data` \(='pets'\) has images of 1x1x3, but the checkpoint was trained on 3x8x8 \(cifar10\); pass data like"
    )
    with pytest.raises(ValueError, match=message):
        evaluate_on(dataset, classifier, CPU)


def test_evaluation_equals_the_test_of_the_run(finished):
    result = evaluate(finished.folder)
    assert result == finished.test
    assert result.checkpoint == finished.folder / "last.safetensors"
    assert result.machine[-1].endswith(f"revnet evaluate {finished.folder}`")
    checkpoint = newest_checkpoint(finished.folder)
    assert evaluate(checkpoint, "digits", batch_size=360, device="cpu").num_errors == result.num_errors


def test_leaves_the_model_unchanged_in_evaluation_mode(finished):
    classifier = load_classifier(finished.folder).train()
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    evaluate_on(load_dataset("digits"), classifier, CPU)
    assert not classifier.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_reads_images_in_files_as_predict_images_does(tmp_path, num_workers):
    folder = write_image_folder(tmp_path / "pets")
    header = make_header(image_shape=(3, 16, 16), is_resized=True, data=str(folder))
    checkpoint = save_checkpoint(tmp_path / "run" / "last.safetensors", header)
    result = evaluate(checkpoint, num_workers=num_workers, batch_size=4)
    assert (result.data, result.num_images) == ("pets", 6)
    files = sorted((folder / "val").glob("*/*.png"))
    counts = torch.zeros(3, 3, dtype=torch.int64)
    for file, prediction in zip(files, predict_images(checkpoint, files), strict=True):
        names = header.class_names
        counts[names.index(file.parent.name), names.index(prediction.answers[0].class_name)] += 1
    assert torch.equal(result.confusion.counts, counts)


def test_corrupt_file_stops_or_is_skipped(tmp_path, caplog):
    folder = write_image_folder(tmp_path / "pets")
    (folder / "val" / "dog" / "broken.png").write_text("no image")
    header = make_header(image_shape=(3, 16, 16), is_resized=True, data=str(folder))
    checkpoint = save_checkpoint(tmp_path / "last.safetensors", header)
    with pytest.raises(DataError, match=r"broken\.png"):
        evaluate(checkpoint)
    with caplog.at_level(logging.WARNING):
        assert evaluate(checkpoint, on_corrupt="skip").num_images == 6
    assert "broken.png" in caplog.text


def test_shows_progress_on_a_terminal_only(capsys, monkeypatch):
    answers, labels = torch.eye(7), torch.arange(7)
    quiet = run(answers, labels, LETTERS, show_progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(answers, labels, LETTERS, show_progress=True) == quiet
    output, errors = capsys.readouterr()
    assert (output, "evaluating" in errors) == ("", True)


def test_counts_ties_and_nan_correctly():
    labels = torch.arange(7)
    equal = run(torch.zeros(7, 7), labels, LETTERS)
    assert (equal.num_errors, equal.num_top5_errors) == (6, 0)  # the first class is answered, and no logit is larger

    class SayNothing(SayPixels):
        def forward(self, images):
            return super().forward(images) * torch.nan

    dataset = make_dataset(torch.zeros(7, 7), labels, LETTERS)
    broken = evaluate_on(dataset, SayNothing(make_header(LETTERS, image_shape=(1, 1, 7))), CPU)
    assert (broken.num_errors, broken.num_top5_errors) == (6, 7)
    assert math.isnan(broken.cross_entropy)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, r"`batch_size` \(=0\) must be 1 or more"),
        ({"num_workers": -1}, ValueError, r"`num_workers` \(=-1\) must be 0 or more"),
        ({"device": "abacus"}, ValueError, r"`device` \(='abacus'\) is not a device"),
        ({"on_corrupt": "ask"}, ValueError, r"`on_corrupt` \(='ask'\) must be"),
        ({"data": "digit"}, ValueError, "did you mean 'digits'"),
        ({"checkpoint": "nothing"}, CheckpointError, "`nothing` does not exist"),
    ],
)
def test_rejects_invalid_arguments(tmp_path, arguments, error, message):
    checkpoint = save_checkpoint(tmp_path / "last.safetensors", make_header(LETTERS, data="digits"))
    with pytest.raises(error, match=message):
        evaluate(**({"checkpoint": checkpoint} | arguments))


def test_large_images_use_smaller_batches():
    sizes = [(8, 8), (32, 32), (64, 64), (224, 224), (5000, 5000)]
    assert [usual_batch_size(size) for size in sizes] == [500, 500, 500, 41, 1]
