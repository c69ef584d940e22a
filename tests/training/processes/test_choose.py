import pytest
import torch

from revnet.training import TrainConfig
from revnet.training.device import find_device
from revnet.training.processes.choose import choose_world, device_of
from revnet.training.processes.world import World, check_division, entered, is_printing, launched_world

SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "run",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in {*SLURM, *TORCHRUN, "SLURM_JOB_NAME", "SLURM_NNODES"}:
        monkeypatch.delenv(name, raising=False)


def set_variables(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("variables", "launcher"), [(SLURM, "SLURM"), (TORCHRUN, "torchrun")])
def test_a_launcher_has_started_the_processes(variables, launcher, monkeypatch):
    set_variables(monkeypatch, variables)
    expected = World(rank=3, num_processes=4, local_rank=1, num_nodes=2, launcher=launcher)
    assert launched_world() == expected
    for devices in (None, "auto", 2):
        assert choose_world("cpu", devices, num_nodes=2) == expected
    assert not expected.must_start
    assert not is_printing()
    with pytest.raises(
        ValueError,
        match=rf"^`devices` \(=3\) must equal the number of processes on each node that {launcher} has started, 2;",
    ):
        choose_world("cpu", 3)
    with pytest.raises(ValueError, match=rf"^`num_nodes` \(=1\) must equal the number of nodes that {launcher} has"):
        choose_world("cpu", None, num_nodes=1)


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},  # `srun --pty bash` with one task
        {"SLURM_JOB_NAME": "bash"},
        {"SLURM_JOB_NAME": "interactive"},
    ],
)
def test_an_interactive_shell_of_slurm_is_one_process(change, monkeypatch):
    set_variables(monkeypatch, SLURM | change)
    assert choose_world("cpu", None) == World()


def test_a_batch_script_of_slurm_is_one_process(monkeypatch):
    set_variables(monkeypatch, {k: v for k, v in SLURM.items() if "STEP" not in k})
    assert choose_world("cpu", None) == World()


def test_nodes_run_the_same_number_of_processes(monkeypatch):
    set_variables(monkeypatch, SLURM | {"SLURM_STEP_NUM_TASKS": "5"})
    with pytest.raises(ValueError, match=r"^`--ntasks` \(=5\) of SLURM must be a multiple of the 2 nodes"):
        launched_world()
    set_variables(monkeypatch, TORCHRUN | {"WORLD_SIZE": "5"})
    with pytest.raises(ValueError, match=r"^`--nproc-per-node` \(=2\) must be the same on all nodes"):
        launched_world()


def test_starts_processes_on_one_machine(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert choose_world("cpu", 1) == choose_world("cpu", "auto") == choose_world("cpu", None) == World()
    assert choose_world("cpu", 2) == World(num_processes=2)
    assert World(num_processes=2).must_start
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert choose_world("cuda", "auto") == choose_world("auto", "auto") == World(num_processes=8)
    assert device_of("cuda", World(rank=9, num_processes=16, local_rank=1, num_nodes=2)) == torch.device("cuda", 1)


def test_rejects_devices_that_the_machine_lacks(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.warns(UserWarning, match=r"^`devices` \(=3\) exceeds the 2 cores of this machine"):
        choose_world("cpu", 3)
    with pytest.raises(ValueError, match=r"^`num_nodes` \(=2\) needs a launcher .* `srun` .* `torchrun --nnodes 2"):
        choose_world("cpu", 2, num_nodes=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match=r"^`devices` \(=2\) must not exceed the 1 CUDA device that this process can use"
    ):
        choose_world("cuda", 2)
    with pytest.raises(ValueError, match=r"^`device` \(='cuda:0'\) is a single device, and 2 are to be used"):
        choose_world("cuda:0", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"^`devices` \(=2\) must be 1 with the device mps"):
        choose_world("mps", 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "2"}, r"^`device` \(=2\) is the kind of device; the number of devices is `--devices 2`\.$"),
        ({"device": "cuda:1"}, r"^`device` \(=cuda:1\) is the kind of device; .*CUDA_VISIBLE_DEVICES=1"),
        (
            {"devices": "cuda"},
            r"^`devices` \(=cuda\) is the number of devices; the kind of device is `--device cuda`\.$",
        ),
        ({"devices": 0}, r"^`devices` \(=0\) must be 1 or more\.$"),
        ({"num_nodes": 0}, r"^`num_nodes` \(=0\) must be 1 or more\.$"),
        ({"strategy": "fsdp"}, r"^`strategy` \(='fsdp'\) must be `auto` or `ddp` or `fsdp2`\.$"),
    ],
)
def test_rejects_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
    with pytest.raises(TypeError, match=r"^`devices` \(='many'\) must be an integer\.$"):
        TrainConfig(devices="many")


def test_names_the_other_setting_of_a_command():
    with pytest.raises(
        ValueError, match=r"^`device` \(='2'\) is the kind of device; the number of devices is `devices`"
    ):
        find_device("2")


def test_rejects_a_batch_that_processes_cannot_divide():
    check_division(33, range(1))
    with entered(World(num_processes=2)):
        check_division(32, range(2))
        with pytest.raises(
            ValueError, match=r"^`batch_size` \(=33\) must be a multiple of the 2 processes .* pass 32 or 34"
        ):
            check_division(33)
        with pytest.raises(ValueError, match=r"^`batch_size` \(=1\) must be a multiple of the 2 .* pass 2, or use"):
            check_division(1)
        with pytest.raises(ValueError, match=r"^`val_fraction` leaves 1 samples for validation, fewer than the 2 proc"):
            check_division(32, range(1))
