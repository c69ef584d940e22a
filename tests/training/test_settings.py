from dataclasses import fields
from typing import get_args

import pytest

from revnet.cli._docstrings import describe_fields
from revnet.errors import CheckpointError
from revnet.training import LanguageConfig, NiceConfig, TrainConfig, resume
from revnet.training.settings.fields import list_groups
from revnet.training.settings.run_config import read_task


@pytest.mark.parametrize(("config", "task"), [(TrainConfig(), None), (NiceConfig(), "nice"), (LanguageConfig(), "lm")])
def test_settings_file_names_its_task(tmp_path, config, task):
    config.save(tmp_path / "config.yaml")
    assert read_task(tmp_path / "config.yaml") == task
    assert type(config).load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("kind", "command"), [(NiceConfig, "nice"), (LanguageConfig, "lm")])
def test_unknown_setting_names_the_command_that_lists_them(tmp_path, kind, command):
    (tmp_path / "config.yaml").write_text(f"task: {command}\nepoch: 3\n")
    with pytest.raises(ValueError, match=rf"unknown setting `epoch`; `revnet train {command} --help` lists them all"):
        kind.load(tmp_path / "config.yaml")


def test_rejects_an_unknown_task(tmp_path):
    (tmp_path / "config.yaml").write_text("task: glow\n")
    with pytest.raises(
        CheckpointError, match=r"is for the task `glow`, which this revnet does not know; update revnet"
    ):
        resume(tmp_path)


@pytest.mark.parametrize("kind", [TrainConfig, NiceConfig, LanguageConfig])
def test_every_field_is_documented(kind):
    assert describe_fields(kind).keys() >= {field.name for field in fields(kind)}


@pytest.mark.parametrize("config_type", [TrainConfig, NiceConfig, LanguageConfig])
def test_every_number_has_a_rule(config_type):
    for field in fields(config_type):
        if {int, float} & {field.type, *get_args(field.type)}:
            assert "check" in field.metadata, field.name


def test_groups_hold_each_setting_once():
    groups = list_groups(NiceConfig)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(field.name for field in fields(NiceConfig))
    assert len(names) == len(set(names))
    assert groups["devices"] == [
        "device",
        "devices",
        "num_nodes",
        "strategy",
        "sync_batch_norm",
        "precision",
        "num_threads",
    ]  # although NiceConfig describes two of them itself
    assert groups["settings"][0] == "task"


def test_every_group_states_its_rules():
    """A rule of a group holds for the settings that derive from it, besides the rules of the family."""
    with pytest.raises(ValueError, match=r"`policy` .* does not go with a `memory_budget`"):
        NiceConfig(policy="store", memory_budget="1GiB")
    with pytest.raises(ValueError, match=r"`num_couplings` .* must be even"):
        NiceConfig(num_couplings=3)
