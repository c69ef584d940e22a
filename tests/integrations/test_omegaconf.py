"""The settings of a run are structured configs of OmegaConf, as Hydra uses them."""

import pytest

from revnet.training import LanguageConfig, NiceConfig, TrainConfig

omegaconf = pytest.importorskip("omegaconf", minversion="2.4", reason="omegaconf 2.4 is not installed")
OmegaConf = omegaconf.OmegaConf

SETTINGS = [TrainConfig, NiceConfig, LanguageConfig]


@pytest.mark.parametrize("settings", SETTINGS)
def test_defaults_come_back(settings):
    assert OmegaConf.to_object(OmegaConf.structured(settings)) == settings()


def test_overrides_are_checked():
    config = OmegaConf.structured(TrainConfig)
    overridden = OmegaConf.merge(config, {"epochs": 3, "decay_at": [0.25, 0.5], "device": "cpu", "devices": "auto"})
    assert OmegaConf.to_object(overridden) == TrainConfig(epochs=3, decay_at=(0.25, 0.5), device="cpu", devices="auto")
    with pytest.raises(omegaconf.errors.ValidationError):
        OmegaConf.merge(config, {"device": "abacus"})
    with pytest.raises(ValueError, match="`epochs`"):
        OmegaConf.to_object(OmegaConf.merge(config, {"epochs": 0}))
