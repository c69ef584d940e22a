import pytest

from revnet.training import TrainConfig


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"epochs": 0}, ValueError, r"`epochs` \(=0\) must be 1 or more"),
        ({"epochs": 1.5}, TypeError, r"`epochs` \(=1.5\) must be an integer"),
        ({"epochs": True}, TypeError, r"`epochs` \(=True\) must be an integer"),
        ({"batch_size": -1}, ValueError, r"`batch_size` \(=-1\) must be 1 or more"),
        ({"lr": float("nan")}, ValueError, r"`lr` \(=nan\) must be a finite number above 0"),
        ({"lr": 0}, ValueError, r"`lr` \(=0\) must be a finite number above 0; 0.1 is usual"),
        ({"lr": "1e-3"}, TypeError, r"`lr` \(='1e-3'\) must be a number"),
        ({"decay_at": [0.75, 0.5]}, ValueError, r"`decay_at` \(=\[0.75, 0.5\]\) must rise"),
        ({"decay_at": [1.5]}, ValueError, r"`decay_at` \(=\[1.5\]\) must be a list of fractions between 0 and 1"),
        ({"decay_at": 0.5}, ValueError, r"`decay_at` \(=0.5\) must be a list"),
        ({"decay_factor": 1.1}, ValueError, r"`decay_factor` \(=1.1\) must be a finite number above 0 and at most 1"),
        ({"momentum": 1}, ValueError, r"`momentum` \(=1\) must be a finite number from 0 to below 1"),
        ({"weight_decay": -1e-4}, ValueError, r"`weight_decay` \(=-0.0001\) must be a finite number 0 or more"),
        ({"val_fraction": 1}, ValueError, r"`val_fraction` \(=1\) must be a finite number from 0 to below 1"),
        (
            {"preprocess": "none"},
            ValueError,
            r"`preprocess` \(='none'\) must be `standardize` or `mean_image` or",
        ),
        ({"max_updates": 0}, ValueError, r"`max_updates` \(=0\) must be 1 or more"),
        ({"schedule": "linear"}, ValueError, r"`schedule` \(='linear'\) must be `step` or `cosine` or"),
        ({"policy": "keep"}, ValueError, r"`policy` \(='keep'\) must be `reverse` or `checkpoint` or `store`"),
        (
            {"memory_budget": "16 apples"},
            ValueError,
            r"`memory_budget` \(='16 apples'\) must be a number of bytes with a",
        ),
        ({"memory_budget": "0GiB"}, ValueError, r"`memory_budget` \(='0GiB'\) must be positive"),
        ({"memory_budget": ""}, ValueError, r"`memory_budget` \(=''\) must not be empty"),
        ({"hold": ""}, ValueError, r"`hold` \(=''\) must not be empty"),
        ({"hold": "f,,g"}, TypeError, r"`hold` \(='f,,g'\) must hold names of residual functions, such as 'f'"),
        ({"keep": 64}, TypeError, r"`keep` \(=64\) must be a string"),
        ({"keep": "norm"}, ValueError, r"`keep` holds 'norm', but the names of operators are 'convolution', 'linear'"),
        ({"keep": "6 apples"}, ValueError, r"`keep` \(='6 apples'\) must be a number of bytes with a unit"),
        (
            {"hold": "f", "policy": "checkpoint"},
            ValueError,
            r"`hold` \(='f'\) goes with the policy `reverse` only, and `policy` is 'checkpoint'; leave",
        ),
        (
            {"keep": "convolution", "memory_budget": "1GiB"},
            ValueError,
            r"`keep` \(='convolution'\) does not go with a `memory_budget`, which chooses it for each block; leave one",
        ),
        ({"memory_budget": 2**30}, TypeError, r"`memory_budget` \(=1073741824\) must be a string"),
        (
            {"memory_budget": "1GiB", "policy": "store"},
            ValueError,
            r"`policy` \(='store'\) does not go with a `memory_budget`, which chooses a policy for each block; leave",
        ),
        ({"exact": "yes"}, TypeError, r"`exact` \(='yes'\) must be true or false"),
        (
            {"tolerance": 1},
            ValueError,
            r"`tolerance` \(=1\) must be a finite number above 0 and below 1; 1e-3 is usual",
        ),
        ({"tolerance": 1e-3, "exact": True}, ValueError, r"has no effect with `exact`, which leaves no error to bound"),
        (
            {"tolerance": 1e-3, "policy": "store"},
            ValueError,
            r"the `policy` store reconstructs nothing; leave one of the",
        ),
        ({"drift_every": 0}, ValueError, r"`drift_every` \(=0\) must be 1 or more"),
        ({"on_corrupt": "cry"}, ValueError, r"`on_corrupt` \(='cry'\) must be `stop` or `skip`"),
        ({"warmup": 1}, ValueError, r"`warmup` \(=1\) must be a finite number from 0 to below 1"),
        (
            {"label_smoothing": -0.1},
            ValueError,
            r"`label_smoothing` \(=-0.1\) must be a finite number from 0 to below 1",
        ),
        ({"full_size_at": 0}, ValueError, r"`full_size_at` \(=0\) must be a finite number above 0 and at most 1"),
        ({"start_size": 0}, ValueError, r"`start_size` \(=0\) must be 1 or more"),
        ({"image_size": 0}, ValueError, r"`image_size` \(=0\) must be 1 or more"),
        ({"num_workers": -1}, ValueError, r"`num_workers` \(=-1\) must be 0 or more"),
        ({"cutout": -1}, ValueError, r"`cutout` \(=-1\) must be 0 or more"),
        ({"nesterov": 1.5}, TypeError, r"`nesterov` \(=1.5\) must be true, false or null"),
        ({"nesterov": True, "momentum": 0}, ValueError, r"`nesterov` \(=True\) needs a `momentum` above 0"),
        ({"optimizer": "lbfgs"}, ValueError, r"`optimizer` \(='lbfgs'\) must be `sgd` or `adamw` or `muon` or"),
        (
            {"optimizer": "adamw", "lr": 0.1},
            ValueError,
            r"`lr` \(=0.1\) must be 0.05 or less with the `optimizer` adamw; 0.001 is",
        ),
        (
            {"optimizer": "adamw", "lr": 1e-3, "nesterov": True},
            ValueError,
            r"`nesterov` \(=True\) is for the `optimizer` sgd or muon, not for adamw; leave it out, or pass null",
        ),
        (
            {"optimizer": "adagrad", "momentum": 0.9},
            ValueError,
            r"`momentum` \(=0.9\) is for the `optimizer` sgd, muon, rmsprop, .* or radam, not for adagrad",
        ),
        ({"beta2": 0.99}, ValueError, r"`beta2` \(=0.99\) is for the `optimizer` adam, .* not for sgd"),
        ({"eps": 1e-6}, ValueError, r"`eps` \(=1e-06\) is for the `optimizer` adam, .* not for sgd"),
        ({"optimizer": "rprop"}, ValueError, r"`weight_decay` \(=0.0002\) is not for the `optimizer` rprop"),
        ({"num_cycles": 0}, ValueError, r"`num_cycles` \(=0\) must be 1 or more"),
        ({"cycle_growth": 0.5}, ValueError, r"`cycle_growth` \(=0.5\) must be a finite number from 1 to 10"),
        ({"accumulate": 3}, ValueError, r"`batch_size` \(=100\) must be a multiple of `accumulate` .* pass 99 or 102"),
        (
            {"max_grad_norm": 1, "max_grad_value": 1},
            ValueError,
            r"`max_grad_value` \(=1\) and `max_grad_norm` \(=1\) both clip the gradient; pass null for one",
        ),
        ({"ema_decay": 1}, ValueError, r"`ema_decay` \(=1\) must be a finite number above 0 and below 1"),
        ({"ema_decay": 0.9, "precision": "bf16-true"}, ValueError, r"`ema_decay` \(=0.9\) does not go with the"),
        ({"ema_decay": 0.9, "memory_budget": "1GiB"}, ValueError, r"`ema_decay` \(=0.9\) keeps a second copy of the"),
        ({"accumulate": 2, "memory_budget": "1GiB"}, ValueError, r"`accumulate` \(=2\) keeps the gradients of earlier"),
        ({"compile": "model", "tolerance": 1e-3}, ValueError, r"`compile` \(='model'\) does not go with `tolerance`"),
        ({"compile": "model", "drift_every": 3}, ValueError, r"`compile` \(='model'\) does not go with `drift_every`"),
        ({"compile": "functions", "memory_budget": "1GiB"}, ValueError, r"`compile` \(='functions'\) does not go with"),
        ({"compile": True}, ValueError, r"`compile` \(=True\) must be `off` or `functions` or `model`"),
        *[
            (
                {"cuda_graphs": True, name: value},
                ValueError,
                rf"`cuda_graphs` \(=True\) does not go with `{name}` \(={value}\), which",
            )
            for name, value in {
                "device": "cpu",
                "devices": 2,
                "accumulate": 2,
                "precision": "16-mixed",
                "step_in_backward": True,
                "compile": "model",
                "memory_budget": "1GiB",
                "start_size": 4,
                "tolerance": 0.001,
                "drift_every": 3,
            }.items()
        ],
        (
            {"step_in_backward": True, "accumulate": 2},
            ValueError,
            r"`step_in_backward` \(=True\) does not go with `accumulate` \(=2\), which needs .*; pass 1, or leave",
        ),
        (
            {"step_in_backward": True, "max_grad_norm": 1},
            ValueError,
            r"`step_in_backward` \(=True\) does not go with `max_grad_norm` \(=1\), .*; pass null, or leave",
        ),
        (
            {"step_in_backward": True, "precision": "16-mixed"},
            ValueError,
            r"`step_in_backward` \(=True\) does not go with `precision` \(=16-mixed\)",
        ),
        ({"mixup": -1}, ValueError, r"`mixup` \(=-1\) must be a finite number 0 or more"),
        ({"randaugment": 31}, ValueError, r"`randaugment` \(=31\) must be 30 or less"),
        ({"val_every": 2, "val_fraction": 0}, ValueError, r"`val_every` \(=2\) needs a validation, and `val_fraction`"),
        ({"patience": 2, "val_fraction": 0}, ValueError, r"`patience` \(=2\) needs a validation, and `val_fraction`"),
        ({"schedule": "plateau", "val_fraction": 0}, ValueError, r"`schedule` \(='plateau'\) needs a validation"),
        ({"crop_area": [0.5]}, ValueError, r"`crop_area` \(=\[0.5\]\) must be two shares above 0"),
        ({"crop_area": [0.5, 0.2]}, ValueError, r"`crop_area` \(=\[0.5, 0.2\]\) must be two shares"),
        ({"precision": "16"}, ValueError, r"`precision` \(='16'\) must be `32-true` or `bf16-mixed`"),
        ({"device": "gpu"}, ValueError, r"`device` \(='gpu'\) must be `auto` or `cpu` or `cuda` or `mps`"),
        ({"crop_padding": -1}, ValueError, r"`crop_padding` \(=-1\) must be 0 or more"),
        ({"horizontal_flip": "yes"}, TypeError, r"`horizontal_flip` \(='yes'\) must be true, false or null"),
        ({"num_threads": 0}, ValueError, r"`num_threads` \(=0\) must be 1 or more"),
        ({"seed": 2**32}, ValueError, r"`seed` \(=4294967296\) must be 4294967295 or less"),
        ({"model": ""}, ValueError, r"`model` \(=''\) must not be empty"),
        ({"data": None}, TypeError, r"`data` \(=None\) must be a string"),
    ],
)
def test_rejects_invalid_settings(setting, error, message):
    with pytest.raises(error, match=message) as caught:
        TrainConfig(**setting)
    assert "\n" not in str(caught.value)


def test_mirrors_other_data_than_digits():
    assert (TrainConfig().resolve("digits").crop_padding, TrainConfig().resolve("digits").horizontal_flip) == (1, False)
    assert (TrainConfig().resolve("cifar10").crop_padding, TrainConfig().resolve("cifar10").horizontal_flip) == (
        4,
        True,
    )


def test_workers_decode_and_crop_images_in_files():
    config = TrainConfig().resolve("flowers", is_decoded=True)
    assert (config.preprocess, config.crop_padding, config.horizontal_flip) == ("imagenet", 0, True)
    assert 0 <= config.num_workers <= 8
    config = TrainConfig().resolve("cifar10")
    assert (config.preprocess, config.num_workers) == ("standardize", 0)


def test_resolve_keeps_given_settings():
    given = {"preprocess": "unit_range", "crop_padding": 0, "horizontal_flip": True, "num_threads": 2, "num_workers": 3}
    config = TrainConfig(lr=0.3, **given)
    assert config.resolve("digits") == config
    assert config.resolve("flowers", is_decoded=True) == config


def test_settings_round_trip(tmp_path):
    config = TrainConfig(lr=1e-5, decay_at=[0.25], crop_area=[0.5, 1], horizontal_flip=True, out_dir="somewhere")
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3\nepoch: 4\n", "has the unknown setting `epoch`"),
        ("epochs: [", "is not valid YAML"),
        ("- epochs\n", "must hold one `setting: value` per line"),
        ("", "must hold one `setting: value` per line"),
    ],
)
def test_load_rejects_another_file(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        TrainConfig.load(path)
    assert "\n" not in str(caught.value)
