import pytest

from revnet.errors import CheckpointError
from revnet.training import LanguageConfig, NiceConfig, TrainConfig, resume
from revnet.training.settings import read_task


@pytest.mark.parametrize(("config", "task"), [(TrainConfig(), None), (NiceConfig(), "nice"), (LanguageConfig(), "lm")])
def test_a_file_of_settings_says_what_it_is_for(tmp_path, config, task):
    config.save(tmp_path / "config.yaml")
    assert read_task(tmp_path / "config.yaml") == task
    assert type(config).load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("kind", "command"), [(NiceConfig, "nice"), (LanguageConfig, "lm")])
def test_an_unknown_setting_is_told_with_the_command_that_lists_them(tmp_path, kind, command):
    (tmp_path / "config.yaml").write_text(f"task: {command}\nepoch: 3\n")
    with pytest.raises(ValueError, match=rf"unknown setting `epoch`; `revnet train {command} --help` lists them all"):
        kind.load(tmp_path / "config.yaml")


def test_a_task_of_a_later_version_is_told(tmp_path):
    (tmp_path / "config.yaml").write_text("task: glow\n")
    with pytest.raises(
        CheckpointError, match=r"is for the task `glow`, which this revnet does not know; update revnet"
    ):
        resume(tmp_path)


@pytest.mark.parametrize("kind", [NiceConfig, LanguageConfig])
def test_every_field_has_its_sentence(kind):
    from dataclasses import fields

    import docstring_parser

    documented = {param.arg_name for param in docstring_parser.parse_from_object(kind).params}
    assert documented >= {field.name for field in fields(kind)}
