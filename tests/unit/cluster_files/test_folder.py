"""The other files of `cluster/`: shell, the image, Prometheus, and that nothing in it is a secret."""

import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from tests.unit.cluster_files.ray_start import ray_start_options

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "cluster"
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
# 32 hexadecimal digits and more, as a token has; a private key; an AWS key; a token that stands where its path belongs.
SECRET = re.compile(r"\b[0-9a-fA-F]{32,}\b|PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|RAY_AUTH_TOKEN[=:]|stringData")
COPY = re.compile(r"^COPY (?:--\S+ )*(.+) \S+$", re.MULTILINE)

by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))


@by_file
def test_no_file_holds_a_secret(path: Path) -> None:
    assert SECRET.findall(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "auth_token: 0123456789abcdef0123456789abcdef",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "AKIAABCDEFGHIJKLMNOP",
        "export RAY_AUTH_TOKEN=swordfish",
        "stringData: {auth_token: swordfish}",
    ],
)
def test_a_secret_is_found(text: str) -> None:
    assert SECRET.search(text)


@by_file
def test_files_are_writable_by_their_owner_only(path: Path) -> None:
    assert not path.stat().st_mode & stat.S_IWOTH


def test_the_page_names_every_file() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    others = [path.relative_to(FOLDER) for path in FILES if path.suffix not in (".md", ".dockerignore")]
    assert [str(path) for path in others if f"]({path})" not in page] == []


# -- shell -----------------------------------------------------------------------------------------------------


def _bash_takes(text: str) -> bool:
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, timeout=100).returncode == 0


def test_scripts_are_shell() -> None:
    scripts = [path for path in FILES if path.suffix == ".sh"]
    assert scripts and all(_bash_takes(path.read_text()) and path.stat().st_mode & stat.S_IXUSR for path in scripts)
    assert not _bash_takes("if true; then")


def test_the_slurm_script_has_a_private_token_and_ends_only_what_it_started() -> None:
    text = (FOLDER / "slurm.sh").read_text()
    assert "umask 077" in text and 'mkdir -m 0700 "$private"' in text and "RAY_AUTH_MODE=token" in text
    assert not re.search(r"\bray stop\b|\bpkill\b|\bkillall\b|\bscancel\b", text)
    used = set(re.findall(r"(--[a-z][a-z-]*)=\S+", text[text.index("on_node='") :]))
    assert text.count('"${gpus[@]}"') == 2 and "--num-gpus" in ray_start_options()
    of_srun = {"--nodes", "--ntasks", "--nodelist", "--cpus-per-task", "--unset"}
    assert used - of_srun <= ray_start_options()


def test_the_slurm_script_documents_its_call(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(FOLDER / "slurm.sh"), "run", "job.yaml"], capture_output=True, text=True, cwd=tmp_path, timeout=100
    )
    assert done.returncode == 2 and "usage" in done.stderr and list(tmp_path.iterdir()) == []


# -- the image -------------------------------------------------------------------------------------------------


def _copied(dockerfile: str) -> list[str]:
    return [source for sources in COPY.findall(dockerfile) for source in sources.split()]


def test_what_the_image_is_built_from_is_there_and_sent_to_the_builder() -> None:
    sources = _copied((FOLDER / "Dockerfile").read_text())
    assert {"pyproject.toml", "constraints.txt", "orchestrator"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert ignored[ignored.index("*") :] and {f"!{source}" for source in sources} <= set(ignored)
    assert _copied("FROM scratch\nCOPY --chown=1:1 nothing.txt other.txt /\n") == ["nothing.txt", "other.txt"]


def test_the_image_has_what_the_build_reads() -> None:
    """`pyproject.toml` names files that setuptools opens."""
    project = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'^readme = "(.+)"$|^license-files = \["(.+)"\]$', project, re.MULTILINE)
    assert {name for pair in named for name in pair if name} <= set(_copied((FOLDER / "Dockerfile").read_text()))


def test_the_image_has_the_right_python_and_an_unprivileged_user() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert text[text.index("\nFROM ") :].startswith("\nFROM python:3.11-slim\n")
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1:] == ["1000:1000"]
    assert "RAY_AUTH_MODE=token" in text and "--constraint constraints.txt" in text


# -- Prometheus ------------------------------------------------------------------------------------------------


def test_prometheus_reads_the_file_that_ray_writes() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    (source,) = scrape["file_sd_configs"]
    assert {Path(file).name for file in source["files"]} == {PROMETHEUS_SERVICE_DISCOVERY_FILE}
    head = yaml.safe_load((FOLDER / "on-premises.yaml").read_text())["head_start_ray_commands"][0]
    (temp_dir,) = re.findall(r"--temp-dir=(\S+)", head)
    assert f"{temp_dir}/{PROMETHEUS_SERVICE_DISCOVERY_FILE}" in source["files"]
    assert "--include-dashboard=true" in head  # the dashboard's process writes the file


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of Prometheus, isn't here")
def test_promtool_takes_the_configuration(tmp_path: Path) -> None:
    broken = tmp_path / "prometheus.yml"
    broken.write_text((FOLDER / "prometheus.yml").read_text().replace("file_sd_configs", "file_sd_config"))
    codes = [
        subprocess.run(["promtool", "check", "config", str(path)], capture_output=True, timeout=100).returncode
        for path in (FOLDER / "prometheus.yml", broken)
    ]
    assert codes[0] == 0 and codes[1] != 0
