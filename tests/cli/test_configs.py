"""Every file in `configs/` is a complete recipe, which `--config` takes by path or by name."""

from dataclasses import replace

import pytest
import yaml

from revnet.cli._parser import parse
from revnet.cli.train import train
from revnet.cli.train_lm import train_lm
from revnet.cli.train_nice import _make_config as make_density_config
from revnet.cli.train_nice import train_nice
from revnet.models import list_models
from revnet.training import LanguageConfig, NiceConfig, TrainConfig
from revnet.training.recipes import find_recipe, list_recipes
from revnet.training.settings.fields import list_groups

CIFAR = ["resnet32", "revnet38", "resnet110", "revnet110", "resnet164", "revnet164"]
IMAGENET = ["resnet50", "revnet56", "resnet101", "revnet104"]
TRANSFORMERS = {
    "cifar10/modern": ["revvit_cifar"],
    "cifar10/quick": ["revvit_cifar"],
    "imagenet/modern": ["revvit_small", "revvit_base"],
}
"""Models that are trained differently from the others."""
MODELS = {
    "cifar10/paper": CIFAR,
    "cifar10/modern": CIFAR,
    "cifar10/quick": CIFAR[:2],
    "cifar10/cpu": CIFAR[:2],
    "cifar100/paper": CIFAR,
    "cifar100/modern": CIFAR,
    "cifar100/quick": CIFAR[:2],
    "digits/quick": ["revnet38"],
    "imagenet/paper": IMAGENET,
    "imagenet/modern": IMAGENET,
    "imagenet/quick": IMAGENET[:2],
    "photos/quick": ["revnet56"],
}
DENSITIES = [f"{data}/quick/{model}" for data in ("cifar10", "digits") for model in ("glow", "nice", "realnvp")]
LANGUAGE_MODELS = ["text/quick/lm", "text/quick/lm-hierarchical", "text/quick/lm-lsh"]
CLASSIFIERS = sorted({*list_recipes()} - {*DENSITIES, *LANGUAGE_MODELS})
UPDATES = {"cifar10": 50_000 // 100, "cifar100": 50_000 // 100, "imagenet": 1_281_167 // 256}


def load(name):
    return TrainConfig(**parse(train, "revnet train", ["--config", name]))


def test_lists_all_recipes():
    folders = [*MODELS.items(), *TRANSFORMERS.items()]
    classifiers = [f"{folder}/{model}" for folder, models in folders for model in models]
    assert list_recipes() == sorted([*classifiers, *DENSITIES, *LANGUAGE_MODELS])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_recipe_is_complete_and_named_after_its_data_and_model(name):
    config = load(name)
    data, _, model = name.split("/")
    assert (config.data, config.model) == (data, model)
    assert config.model in list_models()
    assert yaml.safe_load(find_recipe(name).read_text()).keys() >= {*list_groups(TrainConfig)["settings"]}


def load_density(name):
    return NiceConfig(**parse(train_nice, "revnet train nice", ["--config", name]))


@pytest.mark.parametrize("model", ["glow", "realnvp"])
def test_model_takes_its_defaults_from_its_recipe(model):
    recipe = load_density(f"digits/quick/{model}")
    assert make_density_config(model=model) == recipe
    assert make_density_config(model=model, data="cifar10", lr=0.01) == replace(recipe, data="cifar10", lr=0.01)
    assert make_density_config(model="nice") == NiceConfig()


def load_language_model(name):
    return LanguageConfig(**parse(train_lm, "revnet train lm", ["--config", name]))


@pytest.mark.parametrize("name", DENSITIES)
def test_density_recipe_is_complete(name):
    config = load_density(name)
    data, _, model = name.split("/")
    assert (config.data, config.model) == (data, model)
    assert yaml.safe_load(find_recipe(name).read_text()).keys() >= {*list_groups(NiceConfig)["settings"]}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_recipe_is_complete_and_named_after_its_attention(name):
    config = load_language_model(name)
    assert config.data is None
    assert config.attention == (name.partition("-")[2] or "full")
    assert yaml.safe_load(find_recipe(name).read_text()).keys() >= {*list_groups(LanguageConfig)["settings"]}


def test_recipes_of_other_tasks_equal_their_defaults():
    assert load_density("digits/quick/nice") == NiceConfig()
    assert load_language_model("text/quick/lm") == LanguageConfig()


@pytest.mark.parametrize(("name", "task"), [("digits/quick/nice", "train"), ("text/quick/lm", "train nice")])
def test_rejects_a_recipe_of_another_task(name, task):
    function = {"train": train, "train nice": train_nice}[task]
    with pytest.raises(ValueError, match=r"`--config` \(.*\) is for another task|must be `nice`"):
        parse(function, f"revnet {task}", ["--config", name])


def test_digits_recipe_equals_the_defaults():
    assert load("digits/quick/revnet38") == TrainConfig().resolve_rate(is_decoded=False)


@pytest.mark.parametrize("folder", MODELS)
def test_models_of_a_recipe_differ_in_nothing_else(folder):
    """The recipes for CIFAR-100 also equal the recipes for CIFAR-10."""
    configs = [load(f"{folder}/{model}") for model in MODELS[folder]]
    assert len({replace(config, model="any") for config in configs}) == 1
    if folder.startswith("cifar100"):
        assert replace(configs[0], data="cifar10") == load(f"{folder.replace('100', '10')}/{configs[0].model}")


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_paper_recipe_for_cifar(data):
    config = load(f"{data}/paper/revnet164")
    num_updates = config.epochs * UPDATES[data]
    assert num_updates == 80_000
    assert [round(num_updates * fraction) for fraction in config.decay_at] == [40_000, 60_000]
    assert (config.batch_size, config.lr, config.decay_factor, config.schedule) == (100, 0.1, 0.1, "step")
    assert (config.momentum, config.nesterov, config.warmup, config.label_smoothing) == (0.9, False, 0, 0)
    assert (config.weight_decay, config.val_fraction, config.preprocess) == (2e-4, 0, "mean_image")
    assert (config.crop_padding, config.horizontal_flip, config.cutout) == (2, True, 0)
    assert (config.precision, config.start_size) == ("32-true", None)


def test_paper_recipe_for_imagenet():
    config = load("imagenet/paper/revnet104")
    assert config.max_updates == 600_000
    assert config.epochs * UPDATES["imagenet"] >= config.max_updates
    assert [round(config.max_updates * fraction, -3) for fraction in config.decay_at] == [160_000, 320_000, 480_000]
    assert (config.batch_size, config.lr, config.decay_factor, config.momentum) == (256, 0.1, 0.1, 0.9)
    assert (config.weight_decay, config.preprocess, config.image_size) == (1e-4, "unit_range", 224)
    assert (config.crop_area, config.horizontal_flip, config.color_distortion) == ((0.05, 1), True, True)


@pytest.mark.parametrize(("data", "paper_updates"), [("cifar10", 80_000), ("cifar100", 80_000), ("imagenet", 600_000)])
def test_modern_recipe_needs_no_more_updates_than_the_paper(data, paper_updates):
    name = f"{data}/modern/{MODELS[f'{data}/modern'][0]}"
    assert load(name).epochs * UPDATES[data] <= paper_updates


@pytest.mark.parametrize(("model", "weight_decay"), [("revvit_small", 0.05), ("revvit_base", 0.1)])
def test_published_recipe_for_vision_transformers(model, weight_decay):
    """PySlowFast's configs/ImageNet/REV_VIT_S.yaml and REV_VIT_B.yaml."""
    config = load(f"imagenet/modern/{model}")
    assert (config.optimizer, config.lr, config.momentum, config.schedule) == ("adamw", 5e-4, 0.9, "cosine")
    assert (config.batch_size, config.epochs, round(config.warmup * config.epochs)) == (512, 300, 70)
    assert (config.weight_decay, config.label_smoothing, config.preprocess) == (weight_decay, 0.1, "imagenet")
    assert (config.image_size, config.start_size) == (224, None)


@pytest.mark.parametrize("recipe", ["modern", "quick"])
def test_image_sizes_for_vision_transformers_are_divisible_by_the_patch_size(recipe):
    config = load(f"cifar10/{recipe}/revvit_cifar")
    assert config.start_size is None or config.start_size % 4 == 0  # and they grow by 4
    assert config.epochs * UPDATES["cifar10"] <= 80_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10/paper/revnet83", "did you mean `cifar10/paper/revnet38`"),
        ("zzz", "neither a YAML file nor a recipe of revnet; `revnet recipes` lists them"),
    ],
)
def test_rejects_an_unknown_recipe(name, message):
    for spelling in (["--config", name], [f"--config={name}"]):
        with pytest.raises(ValueError, match=message):
            parse(train, "revnet train", spelling)
