import json
import math

import pytest

from benchmarks import tuning_curve


def test_the_curve_sums_the_best_of_each_kernel_times_its_uses():
    history = {"a": [math.inf, 3.0, 5.0, 2.0], "b": [1.0, math.inf, 0.5]}
    points = tuning_curve.best_sums(history, {"a": 2, "b": 10}, 4)
    assert points == [(2, 2 * 3.0 + 10 * 1.0), (3, 2 * 3.0 + 10 * 0.5), (4, 2 * 2.0 + 10 * 0.5)]
    assert tuning_curve.best_sums({"a": [math.inf]}, {"a": 1}, 1) == []


def test_how_many_trials_reach_a_result():
    points = [(2, 16.0), (3, 11.0), (4, 9.0)]
    assert tuning_curve.trials_to_reach(points, 11.0) == 3
    assert tuning_curve.trials_to_reach(points, 16.5) == 2
    assert tuning_curve.trials_to_reach(points, 8.0) is None


def test_metaschedules_records_are_read_in_order_and_failures_are_infinite(tmp_path):
    assert tuning_curve.stock_times(tmp_path) == []
    records = [[0, [["trace"], times, {"kind": "llvm"}, None]] for times in ([3e-3, 1e-3, 2e-3], [1e10], [4e-3])]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "database_tuning_record.json").write_text(text)
    assert tuning_curve.stock_times(tmp_path) == [2e-3, math.inf, 4e-3]


def test_time_is_added_up_over_interruptions(tmp_path, monkeypatch):
    clock = iter([10.0, 12.0, 20.0, 90.0, 100.0, 101.0])
    monkeypatch.setattr(tuning_curve.time, "monotonic", lambda: next(clock))
    made = []
    with pytest.raises(KeyboardInterrupt), tuning_curve.metered(tmp_path, lambda: len(made)):
        made += [1, 2]
        raise KeyboardInterrupt
    with tuning_curve.metered(tmp_path, lambda: len(made)):
        pass  # nothing was made: it doesn't count
    with tuning_curve.metered(tmp_path, lambda: len(made)):
        made.append(3)
    assert tuning_curve.meter(tmp_path) == (3.0, 3)


def test_the_summary_says_what_a_trial_costs_and_when_the_other_catches_up():
    tuners = {
        "nnfuze": {"trials": 2, "curve": [(1, 2.0), (2, 1.0)], "seconds_per_trial": 0.1},
        "MetaSchedule": {"trials": 8, "curve": [(1, 9.0), (8, 1.0)], "seconds_per_trial": 1.25},
    }
    document = {"network": "net", "kernels": [{}], "tuners": tuners}
    text = tuning_curve.summary(document)
    assert "nnfuze 0.10 s per trial, MetaSchedule 1.25 s per trial" in text
    assert text.endswith("MetaSchedule is as fast as nnfuze after 2 trials: after 8 trials")
    tuners["MetaSchedule"]["curve"] = [(1, 9.0)]
    assert tuning_curve.summary(document).endswith("not within 8 trials")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "0"], "'0'"),
        (["--trials", "few"], "'few'"),
        (["--network", "resnet9"], "resnet9: no such network or file"),
        (["--plot", "curve.txt"], "use a file name that ends in .png"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path):
    try:
        code = tuning_curve.main([*arguments, "--work-dir", str(tmp_path / "work")])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error" in last and message in last
