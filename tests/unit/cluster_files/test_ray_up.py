"""The files for `ray up` pass Ray's own validation; what they start asks for a token and listens where it should."""

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.unit.cluster_files.ray_start import ray_start_options

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "cluster"
NAMES = ("on-premises.yaml", "aws-spot.yaml")
OPTION = re.compile(r"(?<!\S)(--[a-z][a-z-]*)")

by_name = pytest.mark.parametrize("name", NAMES)


def _config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return found


def _validated(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does before it looks for any host."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def _starts(config: dict[str, Any]) -> list[str]:
    """The `ray start` of the head and of the workers, each from there to its end."""
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    return [command[command.index("ray start") :] for command in commands if "ray start" in command]


@by_name
def test_ray_takes_it(name: str) -> None:
    _validated(_config(name))


@by_name
@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ((), "max_worker", 3),
        ((), "idle_timeout_minutes", "five"),
        (("provider",), "region", 1),
        (("auth",), "user", "ubuntu"),
        ((), "head_start_ray_commands", "ray start"),
    ],
    ids=["key", "type", "provider", "auth", "commands"],
)
def test_ray_does_not_take_a_broken_one(name: str, path: tuple[str, ...], key: str, value: Any) -> None:
    config = _config(name)
    place = config
    for step in path:
        place = place[step]
    place[key] = value
    with pytest.raises(ValidationError):
        _validated(config)


@by_name
def test_options_are_those_of_ray_start(name: str) -> None:
    starts = _starts(_config(name))
    assert len(starts) == 2
    for command in starts:
        assert set(OPTION.findall(command)) <= ray_start_options()
    assert OPTION.findall("ray start --dashbord-host=::1 --head") == ["--dashbord-host", "--head"]
    assert "--head" in ray_start_options() and "--dashbord-host" not in ray_start_options()


@by_name
def test_no_start_ends_other_rays(name: str) -> None:
    """Ray's defaults begin with `ray stop`, which ends every Ray of the host."""
    prepared = _validated(_config(name))
    commands = [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]
    assert commands and not [command for command in commands if "ray stop" in command]


@by_name
def test_the_dashboard_is_on_loopback_only(name: str) -> None:
    head, _ = _starts(_config(name))
    assert "--dashboard-host=127.0.0.1" in head


@by_name
def test_shell_commands_are_shell(name: str) -> None:
    config = _config(name)
    commands = [command for key, value in config.items() if key.endswith("_commands") for command in value]
    assert len(commands) > 4
    for command in commands:
        subprocess.run(["bash", "-n"], input=command, text=True, check=True, timeout=100)


def test_hosts_share_a_token_that_is_a_file() -> None:
    config = _config("on-premises.yaml")
    directory = "~/.orchestrator/clusters/on-premises"
    assert config["file_mounts"][directory] == directory
    (environment,) = [command for command in config["setup_commands"] if "cat > ~/orchestrator-env" in command]
    assert f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={directory.replace('~', '$HOME')}/token" in environment
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all(command.startswith(". ~/orchestrator-env; ") for command in starts)


def test_hosts_of_ones_own_have_the_first_autoscaler() -> None:
    """The second, which `ray up` switches on before the command, never starts a worker there (Ray 2.60)."""
    (head,) = _config("on-premises.yaml")["head_start_ray_commands"]
    assert head.index("export RAY_enable_autoscaler_v2=0") < head.index("ray start")


def test_containers_share_a_token_that_is_a_file() -> None:
    config = _config("aws-spot.yaml")
    options = config["docker"]["run_options"]
    (path,) = [o.partition("TOKEN_PATH=")[2] for o in options if "RAY_AUTH_TOKEN_PATH=" in o]
    assert "--env RAY_AUTH_MODE=token" in options
    assert path.rpartition("/")[0] in config["file_mounts"] and path.endswith("/token")


def test_what_is_mounted_from_the_repository_is_there() -> None:
    mounted = [local for name in NAMES for local in _config(name)["file_mounts"].values() if not local.startswith("~")]
    assert len(mounted) > 4
    assert [local for local in mounted if not (ROOT / local).exists()] == []


def test_the_address_of_the_head_is_the_same_everywhere() -> None:
    text = (FOLDER / "on-premises.yaml").read_text(encoding="utf-8")
    provider = _config("on-premises.yaml")["provider"]
    assert set(re.findall(r"\d+\.\d+\.\d+\.\d+", text)) == {
        provider["head_ip"],
        *provider["worker_ips"],
        "127.0.0.1",
    }
    head, worker = _starts(_config("on-premises.yaml"))
    assert f"--node-ip-address={provider['head_ip']}" in head and provider["head_ip"] not in worker


def test_temporary_files_are_in_a_directory_of_ones_own() -> None:
    for command in [c for key in ("head", "worker") for c in _config("on-premises.yaml")[f"{key}_start_ray_commands"]]:
        (made,) = re.findall(r"install -d -m 0700 (\S+)", command)
        assert f"--temp-dir={made}/" in command and len(made) < 30  # Ray's socket paths must stay below 108 bytes


def test_workers_of_aws_are_spot_instances_within_bounds_and_the_head_is_not() -> None:
    config = _validated(_config("aws-spot.yaml"))
    types = config["available_node_types"]
    head, spot, gpu = types[config["head_node_type"]], types["spot"], types["gpu-spot"]
    assert "InstanceMarketOptions" not in head["node_config"] and head["max_workers"] == 0
    assert all(kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" for kind in (spot, gpu))
    assert 0 < spot["min_workers"] < spot["max_workers"] <= config["max_workers"]
    assert 0 == gpu["min_workers"] < gpu["max_workers"] <= config["max_workers"]
    assert gpu["docker"]["worker_image"] == f"{config['docker']['image']}-gpu"


def test_instances_are_not_reached_from_the_internet() -> None:
    config = _config("aws-spot.yaml")
    assert config["provider"]["use_internal_ips"] is True
    for kind in config["available_node_types"].values():
        node = kind["node_config"]
        assert node["SecurityGroupIds"], "Ray's own would have ssh open to everybody"
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
    assert "IamInstanceProfile" not in config["available_node_types"]["spot"]["node_config"]
