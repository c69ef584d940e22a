"""`revnet train nice` with `sample`, and `revnet train lm` with `generate`."""

import re
from pathlib import Path

import matplotlib.image
import pytest
import torch

from revnet.cli.main import main
from revnet.training import load_density

NICE = ["--num-couplings", 2, "--hidden-dim", 16, "--num-hidden", 1, "--batch-size", 400, "--epochs", 2]
LM = ["--length", 16, "--depth", 1, "--dim", 16, "--num-heads", 2, "--batch-size", 4, "--epochs", 2]
LM += ["--updates-per-epoch", 3, "--num-threads", 1]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generative")
    (folder / "rhyme.txt").write_text("Hickory, dickory, dock, the mouse ran up the clock.\n" * 20)
    assert main(["train", "nice", *map(str, NICE), "--out-dir", str(folder / "nice")]) == 0
    data = ["--data", str(folder / "rhyme.txt")]
    assert main(["train", "lm", *data, *map(str, LM), "--out-dir", str(folder / "lm")]) == 0
    return folder


@pytest.fixture
def assert_refused(revnet):
    def run(arguments, message):
        code, output, errors = revnet(*arguments)
        assert (code, output) == (2, "")
        assert message in errors
        assert errors.count("\n") == 1

    return run


@pytest.mark.parametrize("task", ["nice", "lm"])
def test_task_has_help_and_prints_its_settings(revnet, task):
    code, output, errors = revnet("train", task, "--help")
    assert (code, errors) == (0, "")
    assert output.startswith(f"usage: revnet train {task} ")
    assert "--max-grad-norm" in output
    code, output, _ = revnet("train", task, "--print-config", "--epochs", 3)
    assert code == 0
    assert output.startswith(f"task: {task}\n")
    assert "epochs: 3\n" in output


def test_run_prints_bits_per_dimension_and_paths(revnet, tmp_path):
    code, output, errors = revnet("train", "nice", *NICE, "--out-dir", tmp_path / "run")
    assert (code, errors) == (0, "")
    heading, _, summary = output.partition("\n\n")
    assert "model   nice, 2 couplings, logistic prior, 2,208 parameters" in heading
    assert "data    digits, images of 1x8x8 in 17 levels: 1,293 train, 144 validate, 360 test" in heading
    starts = [line.partition("  ")[0] for line in summary.splitlines()]
    assert starts == ["test bits/dim", "", "step time", "activation memory", "", "weights", "", "log", "picture"]


@pytest.mark.parametrize("task", ["nice", "lm"])
def test_any_train_command_resumes_a_run(revnet, runs, task):
    for command in (["train"], ["train", task]):
        code, output, errors = revnet(*command, "--resume", runs / task)
        assert (code, errors) == (0, "")
        assert ("bits/dim" if task == "nice" else "nats/character") in output


@pytest.mark.parametrize(("task", "other"), [("nice", "lm"), ("lm", "nice")])
def test_a_task_refuses_a_run_of_another_task(assert_refused, runs, task, other):
    folder = runs / other
    assert_refused(
        ["train", task, "--resume", folder],
        f"`--resume` (={folder}) is a run of `revnet train {other}`, not of `revnet train {task}`; continue it with "
        f"`revnet train {other} --resume {folder}`.",
    )
    assert_refused(
        ["train", "--resume", "auto", "--out-dir", folder], f"is a run of `revnet train {other}`, not of `re"
    )


def test_full_disk_names_the_option(assert_refused, runs, full_disk):
    folder = runs / "nice"
    message = f"`--out-dir` (='{folder}') cannot be written: No space left on device; pass a folder that you can write"
    assert_refused(["sample", folder, "--num", 1], message)


def test_saved_settings_reproduce_the_run(revnet, runs, tmp_path):
    code, _, _ = revnet("train", "nice", "--config", runs / "nice" / "config.yaml", "--out-dir", tmp_path / "again")
    assert code == 0
    states = [load_density(folder).state_dict() for folder in (runs / "nice", tmp_path / "again")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("missing", ["top", "bottom", "left", "right", "random"])
def test_sample_writes_a_grid_and_inpaints(revnet, runs, tmp_path, missing):
    arguments = ["--num", 10, "--inpaint", missing, "--steps", 2, "--out-dir", tmp_path]
    code, output, errors = revnet("sample", runs / "nice", *arguments)
    assert (code, errors) == (0, "")
    bits = float(output.partition("test bits/dim  ")[2].partition(" (360 images of digits)")[0])
    assert 3 < bits < 6
    written = [Path(line.split()[-1]) for line in output.splitlines()[2:]]
    assert written == [tmp_path / "samples.png", tmp_path / f"inpainting_{missing}.png"]
    for file in written:
        assert matplotlib.image.imread(file).std() > 0.05


@pytest.mark.parametrize("name", ["samples.png", "inpainting_left.png"])
def test_sample_refuses_to_replace_a_file_of_the_user(assert_refused, runs, tmp_path, name):
    (tmp_path / name).write_text("mine")
    message = f"`--out-dir` (='{tmp_path}') holds another `{name}`, which would be replaced; pass another folder"
    assert_refused(["sample", runs / "nice", "--inpaint", "left", "--out-dir", tmp_path], message)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]


def test_sample_depends_on_the_seed_alone(revnet, runs, tmp_path):
    pictures = []
    for number, seed in enumerate((0, 0, 1)):
        assert revnet("sample", runs / "nice", "--seed", seed, "--out-dir", tmp_path / str(number))[0] == 0
        pictures.append((tmp_path / str(number) / "samples.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_score_prints_a_line_per_image_and_writes_a_table(revnet, runs, tmp_path):
    files = [tmp_path / "b.png", tmp_path / "inner" / "a.png"]
    (tmp_path / "inner").mkdir()
    for file in files:
        matplotlib.image.imsave(file, torch.rand(8, 8).numpy(), cmap="gray")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "broken.png").write_text("not an image")
    table = tmp_path / "scores.csv"
    code, output, errors = revnet("score", runs / "nice", files[1], tmp_path, "--csv", table, "--draws", 2)
    assert code == 1
    assert "broken.png' cannot be decoded" in errors
    assert f"weights: {runs / 'nice' / 'last.safetensors'} (epoch " in errors
    assert errors.count("\n") == 2
    lines = output.splitlines()
    assert [line.split()[0] for line in lines[:3]] == [str(files[1]), str(files[0]), str(files[1])]
    assert lines[3].startswith("mean of 3 images ")
    rows = table.read_text().splitlines()
    assert rows[0] == "file,bits_per_dim,log_prob"
    assert [row.split(",")[0] for row in rows[1:]] == [line.split()[0] for line in lines[:3]]


def test_generate_needs_no_prompt_for_a_text_of_one_line(revnet, tmp_path):
    (tmp_path / "line.txt").write_text("the clock is slow and the clock is blue " * 20)
    assert revnet("train", "lm", "--data", tmp_path / "line.txt", *LM, "--out-dir", tmp_path / "run")[0] == 0
    code, output, _ = revnet("generate", tmp_path / "run", "--num", 5)
    assert (code, len(output), output[0]) == (0, 1 + 5 + 1, " ")


def test_generate_continues_the_prompt(revnet, runs):
    texts = []
    for seed in (0, 0, 1):
        arguments = ["--prompt", "the clock", "--num", 20, "--top-k", 5, "--temperature", 0.9, "--seed", seed]
        code, output, errors = revnet("generate", runs / "lm", *arguments)
        assert code == 0
        assert re.fullmatch(rf"weights: {runs / 'lm' / 'last.safetensors'} \(epoch \d\)\n", errors)
        assert output.startswith("the clock")
        assert len(output) == len("the clock") + 20 + 1
        texts.append(output)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "lm"], "revnet train lm: error: `--data` is required: a text file"),
        (["train", "lm", "--data", "none.txt"], "`--data` (='{tmp}/none.txt') does not exist; pass a text file"),
        (["train", "lm", "--dim", "10"], "`--dim` (=10) must be a multiple of twice `--num-heads` (=4)"),
        (["train", "nice", "--num-couplings", "5"], "revnet train nice: error: `--num-couplings` (=5) must be even"),
        (["train", "nice", "--prior", "flat"], "`--prior` (=flat) must be `logistic` or `gaussian`"),
        (["train", "nice", "--model", "revnet38"], "`--model` (=revnet38) must be `nice` or `realnvp` or `glow`"),
        (["train", "nice", "--resume", "{runs}/nice", "--seed", "3"], "`--seed` (=3) cannot change within a run"),
        (["train", "nice", "lm"], "`lm` needs an option before it; `revnet train nice --help` lists them all"),
        (["train", "--config", "digits/quick/nice"], "is for another task; its `task` says which"),
        (
            ["sample", "{runs}/lm"],
            "holds a language model, not a density of images; use `revnet generate`",
        ),
        (["sample", "{runs}/nice", "--inpaint", "middle"], "`--inpaint` (=middle) must be `top` or `bottom` or `left`"),
        (["sample", "{runs}/nice", "--num", "0"], "`--num` (=0) must be 1 or more"),
        (["sample", "{runs}/nice", "--temperature", "-1"], "`--temperature` (=-1.0) must be a finite number 0 or more"),
        (["score", "{runs}/nice", "a.png", "--draws", "0"], "`--draws` (=0) must be 1 or more"),
        (
            ["score", "{runs}/nice", "a.png", "--csv", "{runs}"],
            ") must be a file in a folder that exists",
        ),
        (["score", "{runs}/lm", "a.png"], "holds a language model, not a density of images"),
        (["sample", "nowhere"], "`nowhere` does not exist"),
        (["generate", "{runs}/nice"], "holds a density of images, not a language model; use `revnet sample`"),
        (["generate", "{runs}/lm", "--prompt", "Ö"], "`--prompt` has the character 'Ö', which is not among the 22"),
        (["generate", "{runs}/lm", "--top-p", "2"], "`--top-p` (=2.0) must be a finite number above 0 and at most 1"),
        (["evaluate", "{runs}/nice"], "holds a density of images, not a classifier; use `revnet sample`"),
        (["evaluate", "{runs}/lm"], "holds a language model, not a classifier; use `revnet generate`"),
        (["predict", "{runs}/lm", "image.png"], "holds a language model, not a classifier; use `revnet generate`"),
    ],
)
def test_usage_errors_print_one_line(assert_refused, runs, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert_refused([argument.format(runs=runs) for argument in arguments], message.format(tmp=tmp_path))
    assert not list(tmp_path.iterdir())


def test_sample_rejects_a_classifier(assert_refused, run_dir):
    assert_refused(["sample", run_dir], "holds a classifier, not a density of images; use `revnet evaluate` or")


def test_folder_of_a_run_stands_for_its_last_weights(revnet, runs, tmp_path):
    outputs = []
    for name in ("", "last.safetensors"):
        outputs.append(revnet("generate", runs / "lm" / name, "--num", 5)[1])
        outputs.append(revnet("sample", runs / "nice" / name, "--num", 4, "--out-dir", tmp_path)[1])
    assert outputs[:2] == outputs[2:]
    assert outputs[1].startswith(f"weights        {runs / 'nice' / 'last.safetensors'} (epoch ")
