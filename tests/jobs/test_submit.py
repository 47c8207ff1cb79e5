"""The jobs on a real head of their own: submitted, stopped, killed, submitted again; and local.

A head of its own since the shared session has neither dashboard nor job server. It asks for a
token, as clusters that are not on one machine do.
"""

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from fifa_ray.cli import EXIT_BAD_INPUT, EXIT_CODES, EXIT_TERMINATED, main
from fifa_ray.demo.packaged import text_encoder_folder
from fifa_ray.demo.run import REWARD_WEIGHTS
from fifa_ray.demo.world import generate_world
from fifa_ray.run_dir import RunDir

REPOSITORY = Path(__file__).parents[2]
JOBS = ("filter", "train", "evaluate", "tune", "pipeline")
PYTHON = sys.executable
TOKEN = secrets.token_hex(16)
FINISHED = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}


class Head(NamedTuple):
    client: JobSubmissionClient
    url: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` on the loopback interface, with free ports and a folder of its own."""
    # Short, since Ray keeps Unix sockets there.
    folder = tempfile.mkdtemp(prefix="head", dir="/tmp")
    ports = free_ports(5)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_worker_niceness": "0",
        # Ray kills a stopped job after 3 s, which a busy machine may need to say its last line.
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port",
             "metrics-export-port")  # fmt: skip
    process = subprocess.Popen(
        [
            *(PYTHON, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
            *(f"--{name}={port}" for name, port in zip(names, ports, strict=True)),
            *("--num-cpus=2", "--object-store-memory=200000000", f"--temp-dir={folder}"),
            *("--disable-usage-stats", "--include-log-monitor=false"),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{ports[1]}"
        client = wait_for(lambda: connect(url), process)
        address = {"RAY_ADDRESS": f"127.0.0.1:{ports[0]}"}
        yield Head(client, url, environment | address)
    finally:
        for ended in (*psutil.Process(process.pid).children(recursive=True), process):
            ended.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


def connect(url: str) -> JobSubmissionClient | None:
    try:
        client = JobSubmissionClient(url, headers={"Authorization": f"Bearer {TOKEN}"})
        client.list_jobs()
    except (ConnectionError, RuntimeError):
        return None
    return client


def wait_for(find, process: subprocess.Popen | None = None):
    """What `find` returns once it is true; it is asked until the test's own time limit."""
    while not (found := find()):
        assert process is None or process.poll() is None, "the process has ended"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A filter of a small world in one file of several row groups; run_dir is left open."""
    folder = tmp_path_factory.mktemp("jobs")
    generate_world(folder, num_pairs=320, num_prompts=50, seed=3, num_files=1, num_processes=1)
    file = next((folder / "data").glob("*.parquet"))
    pq.write_table(pq.read_table(file), file, row_group_size=40)
    values = {
        "ingest": {"source": str(folder / "data"), "rows_per_part": 100},
        "rewards": [{"name": "tiny", "kind": "pickscore", "weights": str(REWARD_WEIGHTS)}],
        "judge": {"enabled": False},
        "embed": {"model": str(text_encoder_folder()), "actors": {"max_actors": 1}},
        "select": {
            "selection_size": 30,
            "quality_weight": 0,
            "exclude_harmful": False,
            "compare": ["random"],
        },
        "report": {"enabled": False},
        "ray": {"num_cpus": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def submit(head: Head, *arguments: object) -> str:
    """`ray job submit --working-dir . -- python jobs/filter.py ...`, without waiting."""
    command = " ".join(map(str, (PYTHON, "jobs/filter.py", *arguments)))
    return head.client.submit_job(entrypoint=command, runtime_env={"working_dir": str(REPOSITORY)})


def finished(head: Head, job: str) -> JobStatus:
    return wait_for(lambda: (status := head.client.get_job_status(job)) in FINISHED and status)


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def there(run_dir: Path, pattern: str) -> bool:
    return any(run_dir.glob(pattern))


def driver_of(run_dir: Path) -> psutil.Process | None:
    """The process of a submitted job: `jobs/filter.py` below the shell that Ray starts."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if words[0] == PYTHON and f"run_dir={run_dir}" in words:
            return process
    return None


async def follow(head: Head, job: str) -> str:
    return "".join([lines async for lines in head.client.tail_job_logs(job)])


@pytest.fixture(scope="module")
def submitted_run(head, config, tmp_path_factory) -> RunDir:
    """Stopped in one stage, killed in the next, then left to finish: the same command each time."""
    run_dir = tmp_path_factory.mktemp("submitted") / "run"
    arguments = (config, f"run_dir={run_dir}")

    stopped = submit(head, *arguments)
    wait_for(lambda: there(run_dir, "partial/rewards.tiny-*/*.parquet"))
    head.client.stop_job(stopped)
    assert finished(head, stopped) == JobStatus.STOPPED
    log = head.client.get_job_logs(stopped)
    assert last_line(log).startswith(f"Stopped with exit code {EXIT_TERMINATED}: "), log
    assert last_line(log).endswith(str(run_dir))

    killed = submit(head, *arguments)
    driver = wait_for(lambda: driver_of(run_dir))
    wait_for(lambda: there(run_dir, "partial/embeddings-*/*.parquet"))
    driver.kill()
    assert finished(head, killed) == JobStatus.FAILED

    done = submit(head, *arguments)
    followed = asyncio.run(follow(head, done))
    assert finished(head, done) == JobStatus.SUCCEEDED, followed
    assert head.client.get_job_info(done).driver_exit_code == 0
    assert last_line(followed).startswith("Done in ")
    assert last_line(followed).endswith(f"results: {run_dir}")
    assert "rewards/tiny: already complete" in followed
    return RunDir(str(run_dir))


@pytest.mark.timeout(600)
def test_a_stopped_and_a_killed_job_go_on_when_submitted_again(submitted_run):
    manifests = submitted_run.manifests()
    assert manifests["rewards/tiny"].details["rows_reused"] > 0
    assert manifests["embeddings"].details["rows_reused"] > 0
    for stage, manifest in manifests.items():
        assert manifest.rows_in == manifest.rows_out + manifest.rows_quarantined, stage
    pairs, rewards = manifests["pairs"].rows_out, manifests["rewards/tiny"]
    assert rewards.rows_in == pairs == submitted_run.num_rows("pairs")
    assert submitted_run.num_rows("selected") == 30


@pytest.mark.timeout(600)
def test_sigterm_stops_a_local_run_and_the_same_command_goes_on(
    head, submitted_run, config, tmp_path
):
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    command = [PYTHON, str(REPOSITORY / "jobs" / "filter.py"), str(config), f"run_dir={run_dir}"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=tmp_path)
        wait_for(lambda: there(run_dir, "partial/rewards.tiny-*/*.parquet"), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == EXIT_TERMINATED, log.read_text()
    assert last_line(log.read_text()).endswith(f"so far: {run_dir}")
    assert "Traceback" not in log.read_text()

    # The rest on a cluster that RAY_ADDRESS names, as in a submitted job.
    again = subprocess.run(
        command, env=head.environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert last_line(again.stdout).endswith(f"results: {run_dir}")
    run = RunDir(str(run_dir))
    assert run.manifest("rewards/tiny").details["rows_reused"] > 0
    # Two runs that were disturbed in different places kept the same.
    assert run.read_table("selected").equals(submitted_run.read_table("selected"))


@pytest.mark.timeout(600)
def test_bad_input_fails_with_its_message_and_code(head, config, tmp_path):
    mistakes = {
        "select.selection_sise=3": "did you mean select.selection_size?",
        "run_dir=runs/mine": "in a copy of the working directory that Ray deletes",
    }
    given = [f"run_dir={tmp_path}"]
    jobs = {submit(head, config, *given, mistake): mistake for mistake in mistakes}
    for job, mistake in jobs.items():
        assert finished(head, job) == JobStatus.FAILED
        details = head.client.get_job_info(job)
        assert details.driver_exit_code == EXIT_BAD_INPUT
        assert mistakes[mistake] in details.message
        assert EXIT_CODES[EXIT_BAD_INPUT] in last_line(head.client.get_job_logs(job))
    assert not any(tmp_path.iterdir())


def test_no_job_is_taken_without_the_token(head):
    with pytest.raises(AuthenticationError, match="Invalid authentication token"):
        JobSubmissionClient(head.url, headers={"Authorization": "Bearer wrong"}).list_jobs()


@pytest.mark.parametrize("name", JOBS)
def test_every_job_is_a_command_of_the_command_line(name):
    assert name in main.commands
    shown = subprocess.run(
        [PYTHON, REPOSITORY / "jobs" / f"{name}.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    ).stdout
    assert shown.startswith(f"Usage: fifa {name} ")


def test_a_script_does_not_shadow_packages(tmp_path):
    """jobs/evaluate.py is not the package `evaluate`, neither here nor for Ray's workers."""
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import importlib.util, json, sys\n"
        "from fifa_ray.job import leave_script_folder\n"
        "before = importlib.util.find_spec('evaluate').origin\n"
        "leave_script_folder()\n"
        "print(json.dumps([before, sys.path]))\n"
    )
    out = subprocess.run([PYTHON, script], capture_output=True, text=True, check=True).stdout
    before, path = json.loads(out)
    assert before == str(script)
    assert str(tmp_path) not in path
