import pytest

from revnet.models import create_model
from revnet.paper.tables import TABLES
from revnet.training import TrainConfig
from revnet.training.recipes import find_recipe


def test_names_of_the_tables():
    data = ("cifar10", "cifar100", "imagenet")
    usual = [f"{name}{suffix}" for name in data for suffix in ("", "-modern", "-quick")]
    assert list(TABLES) == [*usual, "cifar10-cpu"]


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_every_row_has_a_recipe_and_a_pair(table):
    for row in table.rows:
        config = TrainConfig.load(find_recipe(f"{table.recipe}/{row.model}"))
        assert config.model == row.model
        assert next(other for other in table.rows if other.model == row.pair).pair == row.model


def test_published_errors():
    """The first number is from the paper, the second from a rerun of the official code."""
    errors = {(name, row.model): (row.paper_error, row.rerun_error) for name in TABLES for row in TABLES[name].rows}
    assert errors["cifar10", "revnet38"] == (7.24, 6.86)
    assert errors["cifar10-quick", "resnet32"] == (7.14, 7.26)
    assert errors["cifar100", "revnet164"] == (23.69, 23.61)
    assert errors["imagenet", "revnet104"] == (None, 23.10)
    assert errors["imagenet", "revnet56"] == (None, None)


def test_pairs_have_about_equal_sizes():
    for row in TABLES["cifar10"].rows:
        sizes = [sum(p.numel() for p in create_model(name).parameters()) for name in (row.model, row.pair)]
        assert max(sizes) < 1.03 * min(sizes)
