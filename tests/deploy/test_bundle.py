"""Bundles: written whole or not at all, checked before their code is loaded, run from arrays to arrays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm.deploy import build, bundle
from nnfuze_tvm.deploy.bundle import Bundle
from nnfuze_tvm.deploy.manifest import (
    InputRecord,
    Manifest,
    TargetRecord,
    WeightsRecord,
    describe_hardware,
    describe_target,
    package_versions,
    recorded_signature,
    signature_records,
)
from nnfuze_tvm.deploy.runner import Runner, made_up, signature
from nnfuze_tvm.deploy.weights import WEIGHTS
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.errors import BundleError, InputError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.passes import pipeline
from tests.bundles import rewrite, write_bundle, write_tiny_bundle
from tests.tiny_networks import classifier, samples


@pytest.fixture(scope="module")
def network() -> tuple[relax.VMExecutable, Manifest, tvm.IRModule]:
    models = [classifier(), classifier(head_seed=1, outputs=2)]
    mod = tvm.transform.Sequential(pipeline.merge_phases())(load(models, ["one", "two"]))
    target = resolve("host")
    manifest = Manifest(
        **signature_records(*signature(mod)), target=describe_target(target), versions=package_versions()
    )
    return build.build(mod, target), manifest, mod


@pytest.fixture(scope="module")
def written(network: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "out"
    write_bundle(path, network[0], network[1], extra={"report.json": "{}"})
    return path


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_answers_are_those_of_the_executable(network: tuple, written: Path) -> None:
    loaded = Bundle.load(written)
    assert loaded.tasks == ["one", "two"]
    assert [(o.task, o.name, o.classes) for o in loaded.outputs] == [
        ("one", "scores", 3),
        ("two", "scores", 3),
        ("two", "scores1", 3),
    ]
    expected = Runner(network[0], *signature(network[2]))
    x = samples(1)
    got, want = loaded.run({"x": x}), expected.run({"x": x})
    assert got["one"].shape == (1, 3)
    np.testing.assert_array_equal(got["one"], want["one"])
    assert set(got["two"]) == {"scores", "scores1"}
    np.testing.assert_array_equal(got["two"]["scores1"], want["two"]["scores1"])


def test_answers_stay_valid_and_inputs_untouched(written: Path) -> None:
    loaded = Bundle.load(written)
    x, y = samples(1, seed=1), samples(1, seed=2)
    before = x.copy()
    first = loaded.run({"x": x})["one"]
    kept = first.copy()
    loaded.run({"x": y})
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(x, before)
    # strided and read-only inputs are as good as any
    strided = np.repeat(x, 2, axis=3)[..., ::2]
    strided.setflags(write=False)
    np.testing.assert_array_equal(loaded.run({"x": strided})["one"], kept)


def test_several_bundles_and_threads_side_by_side(written: Path, copy: Path) -> None:
    bundles = [Bundle.load(written), Bundle.load(copy, threads=2), Bundle.load(written)]
    inputs = [samples(1, seed=n) for n in range(3)]
    expected = [b.run({"x": x})["one"] for b, x in zip(bundles, inputs, strict=True)]
    np.testing.assert_array_equal(bundles[0].run({"x": inputs[1]})["one"], expected[1])
    wrong = []

    def work(n: int) -> None:
        for _ in range(50):
            if not np.array_equal(bundles[n].run({"x": inputs[n]})["one"], expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n % 3,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_running_does_not_pin_the_process(written: Path) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no affinity here")
    before = os.sched_getaffinity(0)
    Bundle.load(written).run({"x": samples(1)})
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'x': missing"),
        ({"y": samples(1)}, "input 'y': the network has no such input; it takes x"),
        ({"x": samples(1), "y": samples(1)}, "input 'y'"),
        ({"x": samples(2)}, r"shape \[2, 2, 6, 6\]; the network takes \[1, 2, 6, 6\]"),
        ({"x": samples(1).astype(np.float64)}, "dtype float64; the network takes float32"),
        ({"x": samples(1).tolist()}, "a list; give a numpy array"),
    ],
)
def test_inputs_are_checked(written: Path, inputs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Bundle.load(written).run(inputs)
    with pytest.raises(InputError, match="threads"):
        Bundle.load(written, threads=-1)


def test_call_overhead(written: Path) -> None:
    """A call costs little beyond the kernels (some 6 µs on a quiet machine)."""
    loaded = Bundle.load(written)
    inputs = {"x": samples(1)}
    best = {}
    for name, call in {"run": lambda: loaded.run(inputs), "kernels": loaded.runner.invoke}.items():
        times = []
        for _ in range(300):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        best[name] = min(times)
    assert best["run"] - best["kernels"] < 50e-6


def test_constants_are_stored_once(tmp_path: Path) -> None:
    target = resolve("host")
    sizes = {}
    for channels in (2, 130):
        model = classifier(shape=(1, channels, 6, 6))
        mod = tvm.transform.Sequential(pipeline.merge_phases())(load([model], ["one"]))
        path = tmp_path / str(channels)
        manifest = Manifest(**signature_records(*signature(mod)), target=describe_target(target))
        write_bundle(path, build.build(mod, target), manifest)
        sizes[channels] = bundle.bytes_on_disk(path)
    weights = 8 * 128 * 9 * 4
    assert weights * 0.9 < sizes[130] - sizes[2] < weights * 1.35


def test_existing_directories(network: tuple, tmp_path: Path) -> None:
    executable, manifest, _ = network
    out = tmp_path / "deep" / "out"
    write_bundle(out, executable, manifest)
    with pytest.raises(BundleError, match="exists already; use --force"):
        write_bundle(out, executable, manifest)
    write_bundle(out, executable, manifest, force=True)
    assert Bundle.load(out).tasks == ["one", "two"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(BundleError, match="is not a bundle, so it is not replaced"):
        write_bundle(tmp_path / "mine", executable, manifest, force=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "deep", "lib.so", "manifest.json", "mine", "out", "thesis.txt",
    ]  # fmt: skip


def test_what_replaces_a_loaded_bundle_is_loaded(network: tuple, copy: Path) -> None:
    """The system's loader knows libraries by name."""
    old = Bundle.load(copy)
    mod = tvm.transform.Sequential(pipeline.merge_phases())(
        load([classifier(seed=7), classifier(seed=7, head_seed=1, outputs=2)], ["one", "two"])
    )
    write_bundle(copy, build.build(mod, resolve("host")), network[1], force=True)
    feed = {each.name: np.ones(each.shape, each.dtype) for each in old.inputs}
    before, after = old.run(feed), Bundle.load(copy).run(feed)
    assert not np.allclose(after["one"], before["one"])
    np.testing.assert_array_equal(old.run(feed)["one"], before["one"])


@pytest.mark.parametrize("existing", [False, True])
def test_full_disk_leaves_everything_as_it_was(
    network: tuple, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    out = tmp_path / "out"
    if existing:
        shutil.copytree(written, out)
    before = sorted(p.name for p in tmp_path.rglob("*"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bundle, "seal", full)
        with pytest.raises(BundleError, match="No space left on device"):
            write_bundle(tmp_path / "new" / "deep" / "out", network[0], network[1])
        with pytest.raises(BundleError, match="No space left on device"):
            write_bundle(out, network[0], network[1], force=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    if existing:
        Bundle.load(out)


def test_replacing_without_an_atomic_exchange(network: tuple, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_exchange", lambda *_: False)
    write_bundle(copy, network[0], network[1], force=True)
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]
    Bundle.load(copy)


def test_links_are_kept_and_what_they_point_to_is_replaced(network: tuple, copy: Path) -> None:
    link = copy.with_name("link")
    link.symlink_to(copy)
    with pytest.raises(BundleError, match="exists already"):
        bundle.check_destination(link)
    assert bundle.check_destination(link, force=True) == copy
    (copy / "report.json").write_text("old")
    write_bundle(link, network[0], network[1], force=True)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["copy", "link"]
    assert link.is_symlink() and not (copy / "report.json").exists()
    Bundle.load(link)


def test_a_bundle_that_was_being_replaced_when_it_was_killed(copy: Path) -> None:
    """Where replacing isn't one step; and when the new one was in place already."""
    copy.rename(bundle._set_aside(copy))
    bundle.check_destination(copy, force=True)
    Bundle.load(copy)
    shutil.copytree(copy, bundle._set_aside(copy))
    bundle.check_destination(copy, force=True)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_flipped_bytes(copy: Path) -> None:
    for name in ("lib.so", "report.json", "manifest.json"):
        data = bytearray((copy / name).read_bytes())
        whole = bytes(data)
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(BundleError, match=f"{name}: (damaged|can't be read|not a)"):
            Bundle.load(copy)
        (copy / name).write_bytes(whole)
    Bundle.load(copy)


def test_missing_parts(copy: Path, tmp_path: Path) -> None:
    (copy / "report.json").unlink()  # not needed on a device
    Bundle.load(copy)
    (copy / "lib.so").unlink()
    with pytest.raises(BundleError, match=r"lib\.so: can't be read"):
        Bundle.load(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"not a bundle, no manifest\.json"):
        Bundle.load(copy)
    with pytest.raises(BundleError, match="no such directory"):
        Bundle.load(tmp_path / "nowhere")


def test_manifest_schema(copy: Path) -> None:
    fields = json.loads((copy / "manifest.json").read_text())
    assert len(fields["files"]["lib.so"]["sha256"]) == 64
    (copy / "manifest.json").write_text(json.dumps({**fields, "format": 99}))
    with pytest.raises(BundleError, match="format 99, this version reads 4"):
        Bundle.load(copy)
    for text, message in [("[]", "not a bundle's manifest"), ("{", "can't be read"), ("\xff", "can't be read")]:
        (copy / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(BundleError, match=message):
            Bundle.load(copy)


def test_files_outside_the_bundle_are_refused(copy: Path) -> None:
    files = dict(bundle.read_manifest(copy).files)
    files["../secret"] = files["lib.so"]
    rewrite(copy, files=files)
    with pytest.raises(BundleError, match="secret"):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"arch": "riscv64"}, "made for riscv64, this CPU is"),
        ({"features": ["avx1024"]}, "made for a CPU with avx1024"),
    ],
)
def test_other_machines_are_refused_before_code_is_loaded(
    copy: Path, monkeypatch: pytest.MonkeyPatch, target: dict, message: str
) -> None:
    record = bundle.read_manifest(copy).target
    rewrite(copy, target=TargetRecord.model_validate({**record.model_dump(), **target}))
    monkeypatch.setattr(bundle.loading, "_load", lambda *_: pytest.fail("code was loaded"))
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.load(copy)
    assert "\n" not in str(caught.value)


WRONG = {
    "a shape": lambda r: {"inputs": [r.inputs[0].model_copy(update={"shape": [1, 2, 6, 7]})]},
    "a type": lambda r: {"inputs": [r.inputs[0].model_copy(update={"dtype": "handle"})]},
    "no input": lambda _: {"inputs": []},
    "one output more": lambda r: {"outputs": [*r.outputs, r.outputs[0].model_copy(update={"name": "more"})]},
    "a state": lambda r: {"states": [InputRecord(name="s", shape=[1 << 15, 1 << 15], dtype="float32")]},
    "kernels' shapes": lambda r: {
        "kernels": [k.model_copy(update={"arguments": [([1], "float32")] * len(k.arguments)}) for k in r.kernels]
    },
    "kernels' arguments": lambda r: {"kernels": [k.model_copy(update={"arguments": []}) for k in r.kernels]},
    "no kernels": lambda _: {"kernels": []},
    "no weights": lambda _: {"weights": WeightsRecord()},
    "weights of another type": lambda r: {
        "weights": WeightsRecord(kept=[(shape, "uint8") for shape, _ in r.weights.kept], spread=r.weights.spread)
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.mark.parametrize("change", WRONG)
def test_manifests_that_another_library_would_fit(tiny: Path, tmp_path: Path, change: str) -> None:
    """Sealed again, so that only the library can tell: its kernels write wherever they are told to."""
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    Bundle.load(copy)
    rewrite(copy, **WRONG[change](bundle.read_manifest(copy)))
    with pytest.raises(
        BundleError, match=r"manifest\.json and lib\.so differ in their inputs, outputs, weights or kernels|dtype"
    ):
        Bundle.load(copy)


def test_weights_that_are_not_the_network_s(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    whole = (copy / WEIGHTS).read_bytes()
    flipped = bytes([whole[0] ^ 1, *whole[1:]])
    for data in (flipped, whole[:-1], whole + b"x", b""):
        (copy / WEIGHTS).write_bytes(data)
        with pytest.raises(BundleError, match=f"{WEIGHTS}: damaged"):
            Bundle.load(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=f"{WEIGHTS}: can't be read"):
        Bundle.load(copy)
    files = bundle.read_manifest(copy).files
    rewrite(copy, files={name: record for name, record in files.items() if name != WEIGHTS})
    with pytest.raises(BundleError, match=f"lists no {WEIGHTS}; compile the bundle again"):
        Bundle.load(copy)


def test_weights_stay_what_was_checked(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    loaded = Bundle.load(copy)
    sample = made_up(loaded.inputs)
    before = loaded.run(sample)
    with open(copy / WEIGHTS, "r+b") as file:
        file.write(bytes(1000))
    assert (loaded.run(sample)["one"] == before["one"]).all()


def test_a_library_without_weights_says_so(tiny: Path) -> None:
    library = bundle.loading.load(tiny / "lib.so")
    manifest = bundle.read_manifest(tiny)
    runner = Runner(library, *recorded_signature(manifest))
    with pytest.raises(ValueError, match="has no weights yet"):
        runner.run(made_up(runner.inputs))


def test_kernels_that_the_library_says_nothing_of(written: Path, tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(written, tmp_path / "copy"))
    rewrite(copy, kernels=bundle.read_manifest(tiny).kernels)
    with pytest.raises(BundleError, match="differ in their inputs, outputs, weights or kernels"):
        Bundle.load(copy)


def test_what_chooses_kernels_is_described() -> None:
    record = describe_hardware(resolve("rpi5"))
    assert (record.isa, record.vector_bytes, record.registers, record.cores) == ("arm", 16, 32, 4)
    assert record.far_macs == Hardware.of(resolve("rpi5")).far_macs != describe_hardware(resolve("aarch64")).far_macs
    assert {"neon", "dotprod"} <= set(record.features) and "i8mm" not in record.features
    # 32-bit ARM has NEON, but no kernel may ask for it.
    assert describe_hardware(resolve("armv7")).isa == "generic"
    assert "neon" not in describe_hardware(resolve("armv7")).features


def test_targets_are_described() -> None:
    record = describe_target(resolve("aarch64+dotprod"))
    assert record.arch == "aarch64"
    assert {"neon", "dotprod"} <= set(record.features)
    assert "i8mm" not in record.features
    assert json.loads(record.string)["mcpu"] == record.cpu == "cortex-a76"
    assert bundle.unfit(describe_target(resolve("host"))) is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's count of a process's memory")
def test_memory_does_not_grow(tiny: Path) -> None:
    """Neither by runs nor by loading and unloading; `test_a_million_runs` takes longer to say so."""
    grows(tiny, runs=5_000, loads=50)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's count of a process's memory")
def test_a_million_runs(tiny: Path) -> None:
    grows(tiny, runs=1_000_000, loads=1_000)


def grows(path: Path, runs: int, loads: int) -> None:
    feed = {"x": samples(1)}

    def use(count: int) -> None:
        network = Bundle.load(path)
        for _ in range(count):
            network.run(feed)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    use(1_000)
    for _ in range(20):
        use(3)
    before = resident()
    use(runs)
    after_runs = resident()
    for _ in range(loads):
        use(3)
    # What a run would leave behind is at least 16 bytes.
    assert after_runs - before < 500_000 + runs
    assert resident() - after_runs < 500_000
