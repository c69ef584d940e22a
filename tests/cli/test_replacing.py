"""Commands that name their files themselves replace no file of the user, and say so before the work."""

import datetime

import pytest

from revnet._hardware import hardware_name

STEM = f"{hardware_name()}_{datetime.date.today()}"
FILES = {
    "evaluation_digits.json": ["evaluate", "RUN"],
    "evaluation_digits.csv": ["evaluate", "RUN"],
    "evaluation_digits_best.png": ["evaluate", "RUN/best.safetensors"],
    "learning_rates.png": ["train", "--find-lr"],
    "memory_revnet38_batch4_store.png": ["memory", "revnet38", "--batch", "4", "--policy", "store"],
    "plan_revnet38_batch4.png": ["plan", "revnet38", "--batch", "4", "--budget", "1GiB"],
    "drift_revnet38_batch4_exact.png": ["doctor", "revnet38", "--batch", "4", "--exact"],
    f"complexity-quick_{STEM}.md": ["figure", "complexity", "--quick", "--device", "cpu"],
    f"complexity_{STEM}.png": ["figure", "complexity", "--device", "cpu"],
    f"gradient-angle_revnet38_digits_{STEM}.csv": ["figure", "gradient-angle", "--device", "cpu"],
    f"gradient-angle-exact_revnet38_digits_{STEM}_curves.csv": ["figure", "gradient-angle", "--exact", "--device=cpu"],
    f"engine-quick_{STEM}.csv": ["bench", "--quick"],
    f"engine_{STEM}_time.png": ["bench"],
    f"host_{STEM}.md": ["bench", "--host"],
    "table.md": ["reproduce", "cifar10-quick"],
    "table.png": ["reproduce", "cifar10-quick", "--report-only"],
}


@pytest.mark.parametrize("name", FILES)
def test_refuses_to_replace_a_file_of_the_user(assert_refused, run_dir, tmp_path, name):
    (tmp_path / name).write_text("mine")
    message = f"`--out-dir` (='{tmp_path}') holds another `{name}`, which would be replaced; pass another folder, or re"
    command = [word.replace("RUN", str(run_dir)) for word in FILES[name]]
    assert_refused([*command, "--out-dir", tmp_path], message)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("name", ["table.md", "learning_rates.png", f"complexity_{STEM}.png", f"host_{STEM}.md"])
def test_a_folder_that_cannot_be_made_is_one_line(assert_refused, tmp_path, name):
    (tmp_path / "file").touch()
    message = f"`--out-dir` (='{tmp_path / 'file'}') cannot be written: File exists; pass a folder that you can write"
    assert_refused([*FILES[name], "--out-dir", tmp_path / "file"], message)
