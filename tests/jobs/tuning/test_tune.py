"""Whole tuning jobs over real trackers and servers: what is kept, what is resumed, what is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tvm
from tvm import relax
from tvm.s_tir import meta_schedule as ms

from nnfuze_tvm.devices import targets
from nnfuze_tvm.devices.remote.tracker import EmbeddedTracker
from nnfuze_tvm.errors import DeviceError, InputError
from nnfuze_tvm.jobs import tuning
from tests.jobs.tuning import standin
from tests.servers import embedded


@pytest.fixture(scope="module")
def pair() -> Iterator[EmbeddedTracker]:
    """A tracker that no job has started, with two servers under one key."""
    with embedded(servers=2, key="pair") as tracker:
        yield tracker


def unique(trials: list[tuning.Trial]) -> bool:
    return max(Counter((t.kernel, t.decisions) for t in trials).values()) == 1


def test_a_job_and_what_it_leaves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = set(psutil.Process().children(recursive=True))
    assert standin.run(str(tmp_path), 4) == 2
    assert set(psutil.Process().children(recursive=True)) == before
    assert capfd.readouterr() == ("", "")

    trials = tuning.read_journal(tmp_path)
    job = json.loads((tmp_path / "job.json").read_text())
    names = {kernel["id"]: kernel["name"] for kernel in job["kernels"]}
    assert sorted(kernel["weight"] for kernel in job["kernels"]) == [1, 2]
    assert Counter(t.kernel for t in trials) == dict.fromkeys(names, 4)
    assert unique(trials)
    for name in names:
        assert (0, 0) in [t.decisions for t in trials if t.kernel == name], "the untuned schedule"
    for trial in trials:
        assert (trial.seconds is None) == (trial.error is not None)
        assert trial.started <= trial.finished
        if trial.seconds:
            assert trial.device and trial.device.startswith("127.0.0.1:")
    # Nothing is compiled while this machine measures.
    assert max(t.started for t in trials) <= min(t.finished for t in trials if t.device)

    # The best of every kernel were compared with the untuned schedule.
    finals = [json.loads(line) for line in (tmp_path / "finals.jsonl").read_text().splitlines()]
    assert {final["kernel"] for final in finals} == set(names) and len(finals) == len(names)
    for final in finals:
        times = {tuple(t.decisions): t.time for t in trials if t.kernel == final["kernel"] and t.time}
        assert final["decisions"][0] == [0, 0]
        assert final["trials"] == 4
        fastest = sorted(times, key=lambda d: times[d])
        assert set(map(tuple, final["decisions"])) <= {(0, 0), *fastest[:4]}

    # The database holds the best of every kernel and can be applied.
    database = tuning.load_database(tmp_path)
    for record in database.get_all_tuning_records():
        times = [float(s) for s in record.run_secs]
        (final,) = [final for final in finals if times in final["seconds"]]
        medians = [float(np.median(seconds)) for seconds in final["seconds"]]
        assert float(np.median(times)) <= min(medians) / 0.99
    target = targets.resolve("host")
    mod = standin.kernels()
    with target, database:
        tuned = relax.transform.MetaScheduleApplyDatabase()(mod)
    scheduled = [f for f in tuned.functions.values() if "tirx.is_scheduled" in (f.attrs or {})]
    assert len(scheduled) == 2
    x = np.random.default_rng(0).standard_normal((48, 64), dtype=np.float32)
    results = []
    for version in (mod, tuned):
        machine = relax.VirtualMachine(relax.build(version, target=target), tvm.cpu())
        results.append([field.numpy() for field in machine["main"](tvm.runtime.tensor(x))])
    for plain, fast in zip(*results, strict=True):
        np.testing.assert_allclose(fast, plain, rtol=1e-5)


def test_more_trials_until_the_space_is_used_up(tmp_path: Path, pair: EmbeddedTracker) -> None:
    standin.run(str(tmp_path), 3, pair.address, "pair")
    first = tuning.read_journal(tmp_path)
    with open(tmp_path / "journal.jsonl", "a") as journal:
        journal.write('{"kernel": "cut o')
    standin.run(str(tmp_path), 30, pair.address, "pair")
    trials = tuning.read_journal(tmp_path)
    assert trials[: len(first)] == first
    assert unique(trials)
    for kernel in {t.kernel for t in trials}:
        mine = {t.decisions: t for t in trials if t.kernel == kernel}
        # Candidates with the same machine code as another one are not measured.
        assert set(mine) <= standin.CANDIDATES and len(mine) >= 4
        assert mine[(2,)].error == "ValueError: not for us"
        assert mine[(2,)].device is None
    # Both devices were used.
    assert len({t.device for t in trials} - {None}) == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_job_leaves_nothing_and_goes_on(tmp_path: Path, pair: EmbeddedTracker, how: signal.Signals) -> None:
    journal = tmp_path / "journal.jsonl"
    command = [sys.executable, "-m", "tests.jobs.tuning.standin", str(tmp_path), "6", pair.address, "pair"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(how)
        process.wait(20)
        assert process.stderr is not None
        assert ("KeyboardInterrupt" in process.stderr.read()) == (how == signal.SIGINT)
    assert not psutil.wait_procs(children, timeout=60)[1]
    first = tuning.read_journal(tmp_path)
    ms.database.JSONDatabase(work_dir=str(tmp_path))
    assert 2 <= len(first) < 12
    if how == signal.SIGINT:
        return

    assert standin.run(str(tmp_path), 6, pair.address, "pair") == 2
    trials = tuning.read_journal(tmp_path)
    assert trials[: len(first)] == first
    assert unique(trials)
    assert max(Counter(t.kernel for t in trials).values()) <= 6
    assert len(trials) >= 8


def test_a_job_on_which_nothing_runs(tmp_path: Path, pair: EmbeddedTracker) -> None:
    # aarch64 code on servers that can't load it.
    if targets.resolve("host").attrs["mtriple"].startswith("aarch64"):
        pytest.skip("needs a machine of another kind")
    with pytest.raises(DeviceError, match=r"none of \d+ candidates ran; the first one: ") as caught:
        tuning.tune_kernels(
            standin.kernels(),
            targets.resolve("aarch64"),
            trials=2,
            work_dir=tmp_path,
            tracker=pair.place,
            key="pair",
            progress=False,
            space=standin.space,
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "journal.jsonl").exists()
    assert (tmp_path / "journal.failed.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trials": 0}, InputError, "at least one trial"),
        ({"tracker": "127.0.0.1:1", "key": "x"}, DeviceError, "no answer within 0.2 s"),
        ({"tracker": "127.0.0.1:1"}, DeviceError, "give the key"),
        ({"target": "aarch64"}, DeviceError, "this machine can't run"),
        ({"key": "rpi", "tracker": "PAIR"}, DeviceError, "registered keys: pair"),
        ({"work_dir": "/proc/nowhere"}, InputError, "work directory"),
    ],
)
def test_what_a_user_can_get_wrong(
    tmp_path: Path, pair: EmbeddedTracker, options: dict, error: type[Exception], message: str
) -> None:
    target = targets.resolve(options.pop("target", "host"))
    options = {"trials": 1, "work_dir": tmp_path, "wait_for_device": 0.2, "progress": False, **options}
    if options.get("tracker") == "PAIR":
        options["tracker"] = pair.place
    with pytest.raises(error, match=message) as caught:
        tuning.tune_kernels(standin.kernels(), target, space=standin.space, **options)
    assert "\n" not in str(caught.value)


def test_databases_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tuning job was run there"):
        tuning.load_database(tmp_path)
    (tmp_path / "database_workload.json").write_text("[]\n")
    (tmp_path / "database_tuning_record.json").write_text("[1]\n")
    with pytest.raises(InputError, match="damaged"):
        tuning.load_database(tmp_path)
