import json

import pytest


def test_folder_and_files_of_a_run_give_the_error_printed_by_training(revnet, run_dir, tmp_path):
    error = json.loads((run_dir / "summary.json").read_text())["test_error"]
    for name in ("", "last.safetensors", "checkpoints/update-00000003.ckpt"):
        code, output, errors = revnet("evaluate", run_dir / name, "--out-dir", tmp_path)
        assert (code, errors) == (0, "")
        lines = dict(line.split("  ", 1) for line in output.splitlines() if not line.startswith(" "))
        assert {name: text.strip() for name, text in lines.items()}["accuracy"].endswith(
            f" % (error {100 * error:.2f} %, {round(360 * error)} of 360 wrong)"
        )
        assert list(lines) == [
            *("model", "data", "accuracy", "top-5 error", "cross-entropy", "speed", "hardest", "confusions", "written")
        ]


def test_writes_the_files_listed_in_the_output(revnet, run_dir, tmp_path):
    folder = tmp_path / "new" / "folder"
    code, output, _ = revnet("evaluate", run_dir / "best.safetensors", "--data", "digits", "--out-dir", folder)
    assert code == 0
    files = [folder / f"evaluation_digits_best.{suffix}" for suffix in ("json", "csv", "png")]
    assert output.splitlines()[0].endswith(f"revnet38, {run_dir / 'best.safetensors'} (epoch 1)")
    assert [line[13:].strip() for line in output.splitlines()[-3:]] == [str(file) for file in files]
    assert sorted(folder.iterdir()) == sorted(files)
    machine = json.loads(files[0].read_text())["machine"]
    assert machine[-1].endswith(f"revnet evaluate {run_dir / 'best.safetensors'} --data digits`")


def test_writes_next_to_the_checkpoint_by_default(revnet, run_dir, tmp_path):
    checkpoint = tmp_path / "last.safetensors"
    checkpoint.write_bytes((run_dir / checkpoint.name).read_bytes())
    assert revnet("evaluate", checkpoint, "--batch-size", 100, "--device", "cpu")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation_digits.csv",
        "evaluation_digits.json",
        "evaluation_digits.png",
        "last.safetensors",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`CHECKPOINT` is missing; `revnet evaluate --help` explains it."),
        (["no/such/file.ckpt"], "`no/such/file.ckpt` does not exist; pass a `.safetensors` or `.ckpt` file"),
        (["."], "`.` holds no last.safetensors and no checkpoint"),
        (["empty.ckpt"], "`empty.ckpt` is truncated or not a PyTorch checkpoint"),
        (["empty.safetensors"], "`empty.safetensors` is truncated or not a safetensors file"),
        (["empty.ckpt", "--device", "abacus"], "`--device` (='abacus') is not a device; pass auto, cpu"),
        (["empty.ckpt", "--batch-size", "0"], "`--batch-size` (=0) must be 1 or more"),
        (["empty.ckpt", "--batch-size", "many"], "`--batch-size` (=many) must be an integer"),
        (["empty.ckpt", "--num-workers", "-1"], "`--num-workers` (=-1) must be 0 or more"),
        (["empty.ckpt", "--on-corrupt", "ask"], "`--on-corrupt` (=ask) must be `stop` or `skip`"),
        (
            ["empty.ckpt", "--out-dir", "empty.ckpt"],
            "`--out-dir` (='empty.ckpt') cannot be written: File exists; pass a folder that",
        ),
    ],
)
def test_usage_errors_print_one_line(assert_refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "empty.safetensors").touch()
    assert_refused(["evaluate", *arguments], message)


def test_missing_data_print_one_line(assert_refused, run_dir):
    assert_refused(["evaluate", run_dir, "--data", "no/such/folder"], "does not exist")
