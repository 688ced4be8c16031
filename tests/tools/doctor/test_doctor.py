"""Each thing that can be wrong with a machine or a run has its line; a bundle has no secrets."""

import contextlib
import http.server
import json
import os
import resource
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from clip_train.config import to_yaml
from clip_train.errors import UserError
from clip_train.exit_record import ExitRecord
from clip_train.tools.doctor import machine, surroundings
from clip_train.tools.doctor.bundle import bundle_text, write_bundle
from clip_train.tools.doctor.command import doctor_command
from clip_train.tools.doctor.past_run import examine_run
from clip_train.tools.doctor.software import broken_requirements, known_conflicts
from clip_train.tools.doctor.surroundings import check_hub, check_ranks, check_scheduler
from clip_train.tools.verdict import Line, Verdict
from tests.tools.plan.plans import run_config

SECRETS = ["hf_abcdefgh", "s3cr3t", "AKIA0123", "sig123", "pa55word"]


def write_run(folder, *, loss, rate=1e-3, steps=4000, code=0):
    """Write config, rows and end of a run whose loss follows `loss(step)`."""
    config = run_config("global_batch_size=256", f"steps={steps}", "optim.warmup=10")
    (folder / "config.yaml").write_text(to_yaml(config))
    rows = [
        {
            "step": step, "train/loss": loss(step), "train/in_batch_recall@1": 1 / 256 if loss(step) > 5.5 else 0.5,
            "train/logit_scale": 20.0, "train/learning_rate": rate, "perf/data_wait": 0.01,
        }
        for step in range(20, steps + 1, 20)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ExitRecord(
        code=code, reason="loss is not finite" if code else "finished", step=steps, time="t", launch_id="l"
    ).write(folder)
    return folder


def test_a_run_that_learns_is_fine_and_one_that_does_not_fails(tmp_path, capsys):
    (tmp_path / "good").mkdir()
    (tmp_path / "flat").mkdir()
    good = examine_run(write_run(tmp_path / "good", loss=lambda step: 5.5 * 0.999**step))
    assert [line.verdict for line in good] == ["ok", "ok"]
    flat = write_run(tmp_path / "flat", loss=lambda step: 5.545, code=1)
    assert doctor_command(run_dir=flat, bundle=None, as_json=True) == 1
    found = {line["subject"]: line for line in json.loads(capsys.readouterr().out)}
    assert found["plateau"]["verdict"] == "fail" and "shards check" in found["plateau"]["text"]
    assert found["end"]["verdict"] == "fail" and "not finite" in found["end"]["text"]


@pytest.mark.parametrize(("lost", "verdict"), [((3960, 3980), "warning"), ((3980, 4000), "fail")])
def test_losses_that_were_not_finite_are_told(tmp_path, lost, verdict):
    rows = (write_run(tmp_path, loss=lambda step: 5.5 * 0.999**step) / "metrics.jsonl").read_text().splitlines()
    kept = [{**row, "train/loss": None} if row["step"] in lost else row for row in map(json.loads, rows)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (found,) = (line for line in examine_run(tmp_path) if line.subject == "loss")
    assert found.verdict == verdict and f"in 2 of {len(rows)} rows, first at step {lost[0]:,}" in found.text


def test_what_is_no_run_is_a_mistake_of_the_user(tmp_path):
    with pytest.raises(UserError, match=r"no config\.yaml"):
        doctor_command(run_dir=tmp_path, bundle=None, as_json=False)


def test_a_bundle_tells_everything_but_secrets(tmp_path):
    run = write_run(tmp_path, loss=lambda step: 1.0)
    with (run / "config.yaml").open("a") as file:
        file.write("hf_token: hf_abcdefgh\naws:\n  secret_access_key: AKIA0123\n")
    (run / "events.jsonl").write_text('{"message": "https://me:s3cr3t@host/x?sig=sig123&partNumber=4"}\n')
    lines = [Line(Verdict.fail, "data", "https://user:pa55word@bucket/x.tar cannot be read", "https://a:s3cr3t@b/")]
    environment = {
        "HF_TOKEN": "hf_abcdefgh", "NCCL_DEBUG": "INFO", "WANDB_API_KEY": "s3cr3t", "HOME": "/home/x",
        "CUDA_SECRET_KEY": "AKIA0123", "SLURM_JOB_ID": "77", "AWS_SECRET_ACCESS_KEY": "AKIA0123",
        "HF_ENDPOINT": "https://me:pa55word@mirror",
    }  # fmt: skip
    text = bundle_text(lines, run_dir=run, environment=environment)
    assert not [secret for secret in SECRETS if secret in text], text
    for expected in (
        "NCCL_DEBUG=INFO", "SLURM_JOB_ID=77", "partNumber=4", "global_batch_size: 256", "torch==", "finished",
        "bucket/x", '"step": 4000',
    ):  # fmt: skip
        assert expected in text
    assert "HOME" not in text and str(Path.home()) not in text.replace("~", "")
    with pytest.raises(UserError, match="cannot be written"):
        write_bundle(tmp_path / "nowhere" / "file", lines, run_dir=None)


def test_libraries_that_exclude_each_other_are_named():
    here = {"open-clip-torch": "3.3.0", "webdataset": "1.0.2", "torchmetrics": "1.9", "transformers": "4.57"}
    (found,) = known_conflicts(here)
    assert "open-clip-torch 3.3.0 and webdataset 1.0.2" in found.text and found.verdict is Verdict.warning
    assert known_conflicts(here | {"webdataset": "0.2.86"}) == []
    assert len(known_conflicts(here | {"transformers": "5.0.0"})) == 2


def test_a_requirement_that_does_not_hold_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "demanding-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: demanding\nVersion: 1.0\nRequires-Dist: pillow<3\n"
        "Requires-Dist: numpy<1; extra == 'old'\nRequires-Dist: not a requirement\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = broken_requirements({"demanding": "1.0", "pillow": "12.0", "numpy": "2.0"})
    assert "demanding 1.0 needs pillow<3, here is 12.0" in found.text


@contextlib.contextmanager
def hub(status):
    """Serve one answer to everything on the loopback."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("status", "verdict"), [(200, "ok"), (404, "ok"), (503, "warning")])
def test_the_hub_is_asked_where_huggingface_hub_looks(monkeypatch, status, verdict):
    with hub(status) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        line = check_hub()
    assert line.verdict == verdict and address in line.text
    assert check_hub(seconds=1.0).verdict is Verdict.warning  # nobody answers any more
    monkeypatch.setattr(constants, "ENDPOINT", "nonsense")
    assert check_hub().verdict is Verdict.fail


def test_the_launchers_variables_are_judged(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM", "RANK", "WORLD", "LOCAL_"))]:
        monkeypatch.delenv(name)
    assert "rank 0 of 1" in check_scheduler().text
    monkeypatch.setenv("RANK", "3")
    assert check_scheduler().verdict is Verdict.fail


def test_narrow_limits_are_told(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        assert machine._open_files().verdict is Verdict.warning
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert machine._clock().verdict is Verdict.ok
    monkeypatch.setattr(machine.time, "time", lambda: 10**9)
    assert machine._clock().verdict is Verdict.fail
    monkeypatch.setattr(machine, "_SHARED_GIB", 10**6)
    assert "--shm-size" in machine._shared_memory().fix


def test_decoding_and_reading_are_measured_and_leave_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_DECODING_SECONDS", 0.02)
    monkeypatch.setattr(machine, "_FILE_BYTES", 2**20)
    assert "images/s per core" in machine._decoding().text
    assert "MB/s" in machine._reading(tmp_path).text and not list(tmp_path.iterdir())
    assert machine._reading(tmp_path / "nowhere").verdict is Verdict.warning


@pytest.mark.slow
def test_two_processes_agree_with_one():
    line = check_ranks()
    assert line.verdict is Verdict.ok, line
    assert float(line.text.rpartition(" ")[2]) <= surroundings.MAX_GATHER_ERROR


@pytest.mark.slow
def test_the_whole_examination_ends_well_here(tmp_path, capsys):
    file = tmp_path / "report.txt"
    assert doctor_command(run_dir=None, bundle=file, as_json=False) == 0, capsys.readouterr().out
    text = file.read_text()
    for subject in ("Python", "torch", "GPU", "shared memory", "decoding", "reading", "ranks", "launcher", "hub"):
        assert subject in text
