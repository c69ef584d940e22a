from dataclasses import replace
from pathlib import Path

import torch

from revnet.training.evaluation.confusion import Confusion
from revnet.training.evaluation.evaluation_report import report_evaluation
from tests.training.evaluation.test_evaluate_result import COUNTS, RESULT


def test_reports_figures_hardest_classes_and_confusions():
    assert report_evaluation(replace(RESULT, checkpoint=Path("runs/1/last.ckpt"))) == "\n".join(
        [
            "model          revnet38, runs/1/last.ckpt",
            "data           a/b c, 1,000 test images of 10 classes",
            "accuracy       90.00 % (error 10.00 %, 100 of 1,000 wrong)",
            "top-5 error    1.00 % (10 of 1,000 not among the five best)",
            "cross-entropy  0.2500 nats/image",
            "speed          2,000 images/s on cpu, loading included",
            "hardest        class3   38.78 % wrong, 57 of 147",
            "               class5   32.33 % wrong, 43 of 133",
            "confusions     class3 -> class5  57",
            "               class5 -> class3  43",
        ]
    )


def test_omits_missing_figures():
    perfect = Confusion(10 * torch.eye(10, dtype=torch.int64), RESULT.confusion.class_names)
    lines = report_evaluation(replace(RESULT, confusion=perfect, num_top5_errors=None)).splitlines()
    assert [line.split()[0] for line in lines] == ["model", "data", "accuracy", "cross-entropy", "speed"]
    assert lines[0] == "model          revnet38"


def test_shows_five_rows_and_shortens_long_names():
    names = [f"{number} tench, Tinca tinca, and many other names of it" for number in range(10)]
    lines = report_evaluation(replace(RESULT, confusion=Confusion(COUNTS.roll(1, 0), names))).splitlines()
    assert len(lines) == 6 + 5 + 5
    assert max(map(len, lines)) < 120
    assert lines[11] == (
        "confusions     0 tench, Tinca tinca, and many other ... -> 9 tench, Tinca tinca, and many other ...  90"
    )
