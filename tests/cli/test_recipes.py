import pytest

from revnet.training.recipes import list_recipes


def test_lists_each_recipe_with_command_model_data_and_epochs(revnet, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    code, output, errors = revnet("recipes")
    assert (code, errors) == (0, "")
    heading, *lines = output.splitlines()
    assert heading.split() == ["recipe", "command", "model", "data", "epochs"]
    assert [line.split()[0] for line in lines] == list_recipes()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["cifar10/paper/revnet38"][:3] == ["train", "revnet38", "cifar10"]
    assert rows["digits/quick/nice"] == ["train", "nice", "nice", "digits", "120"]
    assert rows["text/quick/lm"] == ["train", "lm", "lm", "your", "text", "4"]


@pytest.mark.parametrize("width", [30, 60, 80])
def test_fits_the_terminal(revnet, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    _, output, _ = revnet("recipes")
    assert max(map(len, output.splitlines())) <= width
    assert [line.split()[0] for line in output.splitlines()[1:]] == list_recipes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--model", "cifar10/paper/revnet38"],
            "`--model` (=cifar10/paper/revnet38) is a recipe, not a model; pass `--config cifar10/paper/revnet38`, or "
            "revnet38.",
        ),
        (
            ["memory", "digits/quick/revnet38"],
            "`MODEL` (=digits/quick/revnet38) is a recipe, not a model; pass revnet38.",
        ),
        (
            ["doctor", "digits/quick/revnet38"],
            "`MODEL` (=digits/quick/revnet38) is a recipe, not a model; pass revnet38.",
        ),
        (
            ["train", "--config", "revnet56"],
            "`revnet56` is neither a YAML file nor a recipe of revnet; did you mean `imagenet/modern/revnet56`? "
            "`revnet recipes` lists them.",
        ),
        (
            ["train", "--config", "cifar10/paper/revnet39"],
            "`cifar10/paper/revnet39` is neither a YAML file nor a recipe of revnet; did you mean "
            "`cifar10/paper/revnet38`? `revnet recipes` lists them.",
        ),
        (
            ["train", "--config", "nothing"],
            "`nothing` is neither a YAML file nor a recipe of revnet; `revnet recipes` ",
        ),
        (
            ["train", "--model", "revnet39"],
            "`--model` (='revnet39') is not a model of revnet; did you mean 'revnet38'? ",
        ),
        (
            ["train", "--model", "nothing"],
            "`--model` (='nothing') is not a model of revnet; `revnet models` lists them.",
        ),
    ],
)
def test_a_wrong_name_gets_one_suggestion(assert_refused, arguments, message):
    assert_refused(arguments, message)
