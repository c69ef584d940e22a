import pytest

from revnet.training import NiceConfig


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_couplings": 3}, ValueError, r"`num_couplings` \(=3\) must be even, .*; pass 4"),
        ({"hidden_dim": 0}, ValueError, r"`hidden_dim` \(=0\) must be 1 or more"),
        ({"prior": "uniform"}, ValueError, r"`prior` \(='uniform'\) must be `logistic` or `gaussian`"),
        ({"lr": 0.1}, ValueError, r"`lr` \(=0.1\) must be 0.05 or less with the `optimizer` adamw"),
        ({"beta2": 1}, ValueError, r"`beta2` \(=1\) must be a finite number from 0 to below 1"),
        ({"max_grad_norm": 0}, ValueError, r"`max_grad_norm` \(=0\) must be a finite number above 0"),
        ({"epochs": 0}, ValueError, r"`epochs` \(=0\) must be 1 or more"),
        ({"task": "lm"}, ValueError, r"`task` \(='lm'\) must be `nice`"),
        ({"horizontal_flip": None}, TypeError, r"`horizontal_flip` \(=None\) must be true or false"),
        (
            {"memory_budget": "1MiB", "policy": "store"},
            ValueError,
            r"`policy` \(='store'\) does not go with a `memory_budget`",
        ),
    ],
)
def test_rejects_invalid_settings(settings, error, message):
    with pytest.raises(error, match=message) as caught:
        NiceConfig(**settings)
    assert "\n" not in str(caught.value)


def test_settings_round_trip(tmp_path):
    config = NiceConfig(lr=1e-5, prior="gaussian", max_grad_norm=None, out_dir="somewhere")
    config.save(tmp_path / "config.yaml")
    assert NiceConfig.load(tmp_path / "config.yaml") == config
