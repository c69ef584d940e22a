import json

import pytest


def test_all_forms_of_a_run_give_the_error_that_training_printed(revnet, run_dir):
    error = json.loads((run_dir / "summary.json").read_text())["test_error"]
    for path in (run_dir, run_dir / "last.safetensors", run_dir / "last.ckpt"):
        code, output, errors = revnet("evaluate", path)
        assert (code, errors) == (0, "")
        assert output.startswith("revnet38 on the test images of digits: ")
        assert output.endswith(f" % (error {100 * error:.2f} %, {round(360 * error)} of 360 wrong)\n")


def test_data_can_be_named(revnet, run_dir):
    assert revnet("evaluate", run_dir, "--data", "digits") == revnet("evaluate", run_dir)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: checkpoint"),
        (["no/such/file.ckpt"], "`no/such/file.ckpt` is no file; pass a `.safetensors` or `.ckpt` file"),
        (["."], "`.` holds no last.safetensors and no last.ckpt"),
        (["empty.ckpt"], "`empty.ckpt` is truncated or not a PyTorch checkpoint"),
        (["empty.safetensors"], "`empty.safetensors` is truncated or not a safetensors file"),
    ],
)
def test_a_mistake_is_told_in_one_line(assert_refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "empty.safetensors").touch()
    assert_refused(["evaluate", *arguments], message)


def test_missing_data_are_told_in_one_line(assert_refused, run_dir):
    assert_refused(["evaluate", run_dir, "--data", "no/such/folder"], "does not exist")
