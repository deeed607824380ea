"""docker-compose.yml: valid by the Compose schema, consistent with docker/, every command runs as a local process."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import processes
from tests.project.dockerfiles import Environment, base_python, steps
from tests.project.packages import ROOT

FILE, GPU_FILE = ROOT / "docker-compose.yml", ROOT / "docker-compose.gpu.yml"
PIPELINE = ["etl", "features", "train", "export"]
MONITORING = ["prometheus", "grafana"]
SMALL = {"RECIPE": "tiny", "TRAIN_OPTIONS": "--set train.epochs=1 --device cpu"}


def _compose(settings: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the file as Compose reads it: ``${NAME:-default}`` replaced, anchors and merges resolved."""
    chosen = settings or {}
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: chosen.get(found[1]) or found[2], FILE.read_text())
    assert "$" not in text
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _schema_check(file: Path) -> subprocess.CompletedProcess[str]:
    return processes.run(["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", file])


@pytest.mark.parametrize("file", [FILE, GPU_FILE], ids=["base", "gpu"])
def test_the_files_are_valid_by_the_compose_schema(file: Path) -> None:
    done = _schema_check(file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("right", "wrong"), [("healthcheck:", "healthchek:"), ("retries: 12", "retries: {}"), ("count: 1", "count: []")]
)
def test_the_schema_check_sees_mistakes(right: str, wrong: str, tmp_path: Path) -> None:
    text = FILE.read_text()
    assert right in text
    (tmp_path / "docker-compose.yml").write_text(text.replace(right, wrong))
    assert _schema_check(tmp_path / "docker-compose.yml").returncode == 1


def test_services_and_their_order() -> None:
    services = _compose()["services"]
    assert set(services) == {*PIPELINE, "nightly", "triton", "triton-gpu", "smoke", *MONITORING}
    for earlier, later in itertools.pairwise(PIPELINE):
        assert services[later]["depends_on"] == {earlier: {"condition": "service_completed_successfully"}}
    assert services["smoke"]["depends_on"] == {"triton": {"condition": "service_healthy"}}
    started_by_default = [name for name, service in services.items() if "profiles" not in service]
    assert started_by_default == ["triton"], "`docker compose up` serves; it must not train again"


def test_a_gpu_is_reserved_by_the_second_file_alone_except_for_the_server_that_is_named_after_it() -> None:
    base = _compose()["services"]
    assert {name for name, service in base.items() if "deploy" in service} == {"triton-gpu"}
    added = yaml.safe_load(GPU_FILE.read_text())["services"]
    assert set(added) == {"etl", "nightly", "train"} <= set(base)
    assert all(service == {"deploy": base["triton-gpu"]["deploy"]} for service in added.values())
    (device,) = base["triton-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert GPU_FILE.name in FILE.read_text()  # who opens the first file learns of the second


def test_the_two_triton_variants_differ_in_torch_and_device_only() -> None:
    services = _compose()["services"]
    cpu, gpu = services["triton"], services["triton-gpu"]
    assert cpu["build"].pop("args") == {"TORCH_INDEX_URL": "https://download.pytorch.org/whl/cpu"}
    assert gpu.pop("deploy")
    assert gpu.pop("profiles") == ["gpu"]
    assert (cpu.pop("image"), gpu.pop("image")) == ("missrec-t4r-triton:cpu", "missrec-t4r-triton:gpu")
    assert cpu == gpu


def test_builds_name_files_and_arguments_that_exist() -> None:
    for name, service in _compose()["services"].items():
        if name in MONITORING:
            continue
        dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
        assert set(service["build"].get("args", {})) <= set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE)), name
    command = re.search(r"^CMD (\[.*\])$", (ROOT / "docker" / "triton.Dockerfile").read_text(), re.MULTILINE)
    assert command is not None
    assert json.loads(command[1]) == shlex.split(_compose()["services"]["triton"]["command"])


def test_the_build_context_holds_the_package_and_nothing_else() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    packaged = ["LICENSE", "README.md", "missrec_t4r", "pyproject.toml", "requirements", "setup.py"]
    assert sorted(kept) == sorted([*packaged, "triton_models", "docker/entrypoint.sh"])
    assert all((ROOT / name).exists() for name in kept)


def test_the_server_is_closed_by_default() -> None:
    services = _compose()["services"]
    for name in ("triton", "triton-gpu"):
        service = services[name]
        assert service["user"] == "1000:1000"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert all(volume.endswith(":ro") for volume in service["volumes"])
    assert all(port.startswith("127.0.0.1:") for name in MONITORING for port in services[name]["ports"])
    dockerfile = (ROOT / "docker" / "triton.Dockerfile").read_text()
    assert "\nUSER 1000:1000\n" in dockerfile


def test_the_entrypoint_closes_model_control_with_a_key_that_nobody_has(tmp_path: Path) -> None:
    server = tmp_path / "tritonserver"
    server.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    server.chmod(0o755)

    def started(*command: str, **environment: str) -> list[str]:
        path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        script = ROOT / "docker" / "entrypoint.sh"
        done = subprocess.run([script, *command], env=path | environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    first, second = (started("tritonserver", "--a=b") for _ in range(2))
    assert first[0] == "--a=b"
    for words in (first, second):
        for word, door in zip(words[1:], ("http-restricted-api", "grpc-restricted-protocol"), strict=True):
            closed = "model-repository,shared-memory,trace,logging"
            assert re.fullmatch(rf"--{door}={closed}:missrec-control=[0-9a-f]{{32}}", word)
    assert first != second
    assert started("tritonserver", CONTROL_KEY="ours")[0].endswith("missrec-control=ours")
    assert started("echo", "as", "it", "is") == ["as it is"]
    assert started("tritonserver", HTTP="closed")[-1] == "--allow-http=false"
    assert "--allow-http=false" not in started("tritonserver", HTTP="open")
    with pytest.raises(subprocess.CalledProcessError):
        started("tritonserver", HTTP="close")


def test_the_image_of_the_server_is_one_with_the_fixes_of_its_http_endpoint() -> None:
    found = re.search(r"tritonserver:(\d+)\.(\d+)-py3", (ROOT / "docker" / "triton.Dockerfile").read_text())
    assert found is not None
    assert (int(found[1]), int(found[2])) >= (26, 3)  # 25.07: CVE-2025-23310 and 23311; 26.03: CVE-2026-24207


def _words(environment: Environment, service: str) -> list[str]:
    return shlex.split(environment.mapped(_compose(SMALL)["services"][service]["command"]))


def _answer(environment: Environment, command: list[str]) -> dict[str, Any]:
    done = environment.run(command)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _run_every_service(merlin: Environment, triton: Environment) -> None:
    """Run each service's command in the environment of its image; the server is the embedded Triton's."""
    from missrec_t4r.serving.triton.local_server import LocalTriton

    _answer(merlin, ["missrec", "generate", "--users", "120", "--items", "100", "--out", merlin.mapped("/input")])
    answers = {name: _answer(merlin, _words(merlin, name)) for name in PIPELINE}
    assert answers["etl"]["users"] == 120
    assert set(answers["features"]["modalities"]) == {"text", "image"}
    assert answers["export"]["parity"]["equal"] is True
    shell, option, script = _words(merlin, "nightly")
    assert subprocess.run([shell, "-n", option, script], check=False).returncode == 0
    for command in script.split(";"):
        _answer(merlin, shlex.split(command))
    assert (merlin.folder / "output" / "night" / "bundle" / "model.json").is_file()

    program, repository, *arguments = _words(triton, "triton")
    assert program == "tritonserver"
    assert repository == f"--model-repository={answers['export']['repository']}"
    healthcheck = _compose()["services"]["triton"]["healthcheck"]["test"]
    with LocalTriton(answers["export"]["repository"], arguments=tuple(arguments)) as server:
        triton.names |= {"inference:8001": server.grpc_url, "localhost:8001": server.grpc_url}
        answer = _answer(triton, _words(triton, "smoke"))
        assert triton.run(["sh", "-c", triton.mapped(healthcheck)]).returncode == 0
    assert len(answer["recommendations"]) == 5
    assert answer["fallback"] is False
    stopped = triton.run(["sh", "-c", triton.mapped(healthcheck)])
    assert stopped.returncode != 0, "the health check must fail once the server is gone"


@pytest.mark.triton
def test_every_service_runs_as_a_local_process(tmp_path: Path) -> None:
    pytest.importorskip("nvtabular", reason="the first step is NVTabular's")
    here = Environment(tmp_path, Path(sys.executable).parent)
    _run_every_service(here, here)


@pytest.mark.triton
@pytest.mark.slow  # installs both images' packages: some 6 GB, a quarter of an hour
def test_every_service_runs_in_environments_made_by_the_dockerfiles_own_steps(tmp_path: Path) -> None:
    environments = {}
    for name in ("merlin", "triton"):
        dockerfile = ROOT / "docker" / f"{name}.Dockerfile"
        python = _interpreter(base_python(dockerfile))
        environments[name] = Environment.built(tmp_path, python, dockerfile)
    _run_every_service(environments["merlin"], environments["triton"])


def _interpreter(version: str) -> str:
    """Return a Python of the version that a base image carries; skip without one."""
    found = shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip(f"no python{version} on PATH, which the base image carries")
    return found


def test_the_image_installs_what_make_install_installs() -> None:
    """The same requirement files in the same order, with the same options, on the Python that they were pinned on."""
    dockerfile = ROOT / "docker" / "merlin.Dockerfile"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile[makefile.index("$(VENV)/.installed: ") : makefile.index("$(VENV_A)/.installed: ")]
    pattern = r"pip install (?:-q |--no-cache-dir )?(.*?requirements/\S+\.txt)"
    made = re.findall(pattern, recipe.split("check_python)", 1)[1])
    unconditional = [rest for word, rest in steps(dockerfile) if word == "RUN" and not rest.startswith("if ")]
    installed = [found.replace("/opt/missrec-t4r/", "") for found in re.findall(pattern, "\n".join(unconditional))]
    assert installed == made == ["-r requirements/set-b.txt", "--no-deps -r requirements/merlin-b.txt"]
    assert base_python(dockerfile) == "3.11"
