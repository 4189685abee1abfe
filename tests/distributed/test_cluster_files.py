"""The files for launchers and clusters are read by their readers: Accelerate, bash, YAML."""

import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def test_there_is_a_config_for_each_engine():
    assert [path.stem for path in CONFIGS] == ["ddp", "fsdp2", "fsdp2_zero2", "two_nodes"]


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_accelerate_loads_it_and_keeps_every_key(path):
    config = load_config_from_file(str(path)).to_dict()
    written = yaml.safe_load(path.read_text())
    assert {
        key: config[key] for key in written
    } == written  # an unknown key is an error of Accelerate's
    assert f"--config_file {path.relative_to(ROOT)}" in path.read_text()
    assert config["distributed_type"] == ("FSDP" if path.stem.startswith("fsdp2") else "MULTI_GPU")
    assert config["num_processes"] == 8 * config["num_machines"]
    assert config["mixed_precision"] == "no"


def test_the_sharding_engines_are_what_their_names_say():
    loaded = {path.stem: load_config_from_file(str(path)) for path in CONFIGS}
    kept = {name: config.fsdp_config for name, config in loaded.items() if config.fsdp_config}
    assert {name: fsdp["fsdp_reshard_after_forward"] for name, fsdp in kept.items()} == {
        "fsdp2": True,
        "fsdp2_zero2": False,
    }
    assert all(
        fsdp["fsdp_version"] == 2 and not fsdp["fsdp_cpu_ram_efficient_loading"]
        for fsdp in kept.values()
    )


def test_the_slurm_script_is_one_for_bash():
    script = ROOT / "scripts" / "cluster" / "train.slurm"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "#SBATCH --signal=TERM@300" in script.read_text()


def test_the_trainjob_runs_what_is_here():
    job = yaml.safe_load((ROOT / "scripts" / "cluster" / "trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["torchrun"]
    script, config, *rest = trainer["args"]
    assert all((ROOT / Path(path).relative_to("/workspace")).is_file() for path in (script, config))
    assert rest[1:] == ["--resume", "auto"]
    [patch] = job["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    mounted = {
        mount["mountPath"] for container in pod["containers"] for mount in container["volumeMounts"]
    }
    assert any(
        rest[0].startswith(f"output_dir={path}/") for path in mounted
    )  # on the disk that all nodes share
