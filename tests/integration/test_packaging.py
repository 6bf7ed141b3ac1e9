"""What is delivered: the wheel without the checkout, shell completion, the files of ``deploy/``."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import nvembed
from nvembed.core.config import load_config
from nvembed.kernels.build import COMPILERS
from nvembed.serving.config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
KEY = "k" * 20


def test_the_settings_of_the_server_are_valid() -> None:
    config = load_config(ServerConfig, DEPLOY / "server.yaml")
    assert (config.model_name, config.limits.shutdown_seconds) == ("docs", 60)
    assert config.task


def serve_commands() -> list[list[str]]:
    """What the unit and the container run, after the name of the program."""
    unit = (DEPLOY / "nvembed.service").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ExecStart=\S+/nvembed (.*)$", unit, re.MULTILINE)
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    (default,) = re.findall(r"^CMD (\[.*serve.*\])$", DOCKERFILE, re.MULTILINE)
    services = [service["command"] for service in compose["services"].values()]
    return [shlex.split(line), *services, json.loads(default)]


def test_the_commands_are_those_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    import nvembed.serving.server as serving_run
    from nvembed.cli.main import run

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(serving_run, "serve", lambda model, **rest: seen.append(rest))
    for command in serve_commands():
        assert run(command) == 0
    assert [given["keys"] is not None for given in seen] == [True, True, True, False]
    assert [given["host"] for given in seen] == ["127.0.0.1", *["0.0.0.0"] * 3]


def test_the_compose_file_is_sound() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    cpu, gpu = compose["services"]["cpu"], compose["services"]["gpu"]
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert "profiles" not in cpu
    for service in (cpu, gpu):
        assert set(service["secrets"]) == set(compose["secrets"])
        named = {volume.split(":")[0] for volume in service["volumes"]} - {"./server.yaml"}
        assert {name for name in named if not name.startswith("$")} == set(compose["volumes"])
        assert "/cache" in service["volumes"][-1]
        assert (DEPLOY / service["build"]["context"] / "Dockerfile").is_file()
        assert set(service["build"]["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M))
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def sent_to_docker() -> set[str]:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    return {line.removeprefix("!") for line in lines if line.startswith("!")}


def test_the_image_is_made_of_what_is_there() -> None:
    needed = sent_to_docker()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert needed >= {"src", "pyproject.toml", project["readme"], *project["license-files"]}
    assert all((ROOT / name).exists() for name in needed)
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)$", DOCKERFILE, re.MULTILINE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (torch,) = re.findall(r'"(torch[^"]+)"', DOCKERFILE)
    assert torch in project["dependencies"]
    if hadolint := shutil.which("hadolint"):
        done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_sound(tmp_path: Path) -> None:
    text = (DEPLOY / "nvembed.service").read_text(encoding="utf-8")
    (tmp_path / "nvembed.service").write_text(text.replace("/opt/nvembed/bin/nvembed", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "nvembed.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "nvembed.service" in line]
    assert (done.returncode, ours) == (0, [])


# --- the wheel ------------------------------------------------------------------------------------


def call(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the files alone that the image is built from."""
    pytest.importorskip("hatchling", reason="needs hatchling (extra dev)")
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in sent_to_docker() - {"src"}:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__"))
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed program, in an environment that has the wheel, and sees the libraries here."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    install = ["install", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    call(sys.executable, "-m", "pip", "--python", folder, *install, wheel)
    libraries = sysconfig.get_paths("venv", {"base": str(folder), "platbase": str(folder)})
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (Path(libraries["purelib"]) / "libraries.pth").write_text("\n".join(seen))
    return folder / "bin" / "nvembed"


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which nothing leads to the checkout, as the home folder too."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    source = ROOT / "src"
    ours = {
        path.relative_to(source).as_posix()
        for path in (source / "nvembed").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in file.namelist() if name.endswith("METADATA"))
        told = file.read(metadata).decode()
    assert names == ours
    for name in ("data/instructions.yaml", "serving/page.html", "kernels/native/elementwise.cpp"):
        assert f"nvembed/{name}" in names
    assert f"Version: {nvembed.__version__}\n" in told
    assert "License-File: LICENSE\n" in told


def make_dist(*variables: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--directory", str(ROOT), "dist", *variables]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_nothing_is_built_for_a_registry_without_an_address(tmp_path: Path) -> None:
    done = make_dist(f"DIST={tmp_path / 'dist'}")
    assert done.returncode == 2
    assert "error: no address for the README's links; expected make dist ADDRESS=" in done.stderr
    assert not (tmp_path / "dist").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_what_lies_where_a_release_would_go_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = make_dist(f"DIST={tmp_path}", "ADDRESS=https://code.example.org/me/nvembed/blob/v1")
    assert done.returncode == 2
    assert f"error: {tmp_path} is there already" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("make") or not (ROOT / ".git").exists(), reason="needs make")
def test_on_a_registry_the_links_lead_to_the_repository(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="needs hatchling (extra dev)")
    home, dist = "https://code.example.org/me/nvembed", tmp_path / "dist"
    options = [f"DIST={dist}", f"BIN={Path(sys.executable).parent}"]
    done = make_dist(f"ADDRESS={home}/blob/v1", *options)
    assert done.returncode == 0, done.stderr
    (made,) = dist.glob("*.whl")
    assert len(list(dist.glob("*.tar.gz"))) == 1
    with zipfile.ZipFile(made) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith("METADATA"))
        told = file.read(metadata).decode()
    assert f"Project-URL: Repository, {home}\n" in told
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", told)
    places = {link for _, link in links if link.startswith(f"{home}/blob/v1/")}
    places |= {link for image, link in links if image and link.startswith(f"{home}/raw/v1/")}
    assert {link for _, link in links} - places == {"https://arxiv.org/abs/2405.17428"}
    ours = {link.split("/v1/")[1].partition("#")[0] for link in places}
    assert len(ours) > 20
    assert all((ROOT / name).exists() for name in ours)


@pytest.mark.slow
def test_the_program_works_without_the_checkout(program: Path, outside: Path) -> None:
    assert call(program, "-V") == call(program, "--version") == f"nvembed {nvembed.__version__}\n"
    assert "nvembed train RECIPE" in call(program, "--help")
    python = program.parent / "python"
    code = "import nvembed, sys; print(nvembed.__file__); assert 'torch' not in sys.modules"
    assert Path(call(python, "-c", code).strip()).is_relative_to(program.parent.parent)
    code = (
        "import torch\n"  # whose OpenMP the kernels take
        "from nvembed.data.instructions import all_instructions as a\n"
        "from nvembed.kernels.build import library\n"
        "print(len(a()), *(library(f'{n}.cpp') is not None for n in ('elementwise', 'int8')))"
    )
    count, *compiled = call(python, "-c", code).split()
    assert int(count) > 50
    assert compiled == [str(any(map(shutil.which, COMPILERS)))] * 2


@pytest.mark.slow
def test_the_installed_server(program: Path, outside: Path, tiny_decoder_dir: Path) -> None:
    (outside / "keys.txt").write_text(f"me:{KEY}\n")
    shutil.copy(DEPLOY / "server.yaml", outside)
    command = [program, "serve", tiny_decoder_dir, "--port", "0", "--dtype", "float32"]
    command += ["--config", "server.yaml", "--keys", "keys.txt"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        address = next(m[1] for line in lines if (m := re.search(r"docs on (http://\S+)", line)))
        body = json.dumps({"model": "docs:query", "input": "a"}).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(f"{address}/v1/embeddings", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert len(json.load(answer)["data"][0]["embedding"]) == 32
        server.send_signal(signal.SIGTERM)
        server.stderr.read()
        assert server.wait(60) == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion(program: Path, outside: Path) -> None:
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    call("bash", "-c", "nvembed --install-completion; true", env=environment)
    assert "nvembed" in (outside / ".bashrc").read_text()
    script = call("bash", "-c", "nvembed --show-completion; true", env=environment)
    assert "complete -o default -F _nvembed_completion nvembed" in script
    (outside / "script").write_text(script)
    ask = (
        "source ./script; COMP_WORDS=({}); COMP_CWORD={}; _nvembed_completion nvembed; "
        "echo ${{COMPREPLY[@]}}"
    )
    for words, found in (
        ("nvembed enc", "encode"),
        ("nvembed data b", "build"),
        ("nvembed search --hyb", "--hybrid"),
    ):
        command = ask.format(words, len(words.split()) - 1)
        assert call("bash", "-c", command, env=environment).split() == [found]
