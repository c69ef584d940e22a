import pytest

from revnet.paper import reproduction as module


def test_options_reach_the_table(revnet, monkeypatch, tmp_path):
    calls = []

    def reproduce(table, folder, **options):
        calls.append((table.name, folder, options))
        folder.mkdir()
        (folder / "table.md").write_text("the table\n")

    monkeypatch.setattr(module, "reproduce", reproduce)
    arguments = ["--data", "somewhere", "--models", "resnet32,revnet38", "--seeds", "0,1", "--epochs", "3"]
    code, output, errors = revnet("reproduce", "cifar10-quick", *arguments, "--out-dir", tmp_path / "out")
    assert (code, errors) == (0, "")
    assert "the table" in output
    ((name, folder, options),) = calls
    assert (name, folder) == ("cifar10-quick", tmp_path / "out")
    assert options == {
        "models": ["resnet32", "revnet38"],
        "seeds": [0, 1],
        "report_only": False,
        "command": "revnet reproduce cifar10-quick --models resnet32,revnet38 --seeds 0,1 --epochs 3",
        "data": "somewhere",
        "epochs": 3,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar11"], "unknown table `cifar11`; did you mean `cifar10`?"),
        (["zzz"], "unknown table `zzz`; the tables are cifar10, "),
        (["cifar10", "--seeds", "a"], "`--seeds` (=a) must be nonnegative integers separated by commas, such as 0,1."),
        (["cifar10", "--seeds=-1"], "`--seeds` (=-1) must be nonnegative integers separated by commas, such as 0,1."),
        (["cifar10", "--models", "resnet50"], "`--models` (=resnet50) is not in the table cifar10"),
    ],
)
def test_usage_errors_print_one_line(assert_refused, arguments, message):
    assert_refused(["reproduce", *arguments], message)
