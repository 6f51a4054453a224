import json
import shutil
import subprocess

import pytest
from rich.console import Console

from benchmarks import arm_instructions
from benchmarks.arm import counting
from benchmarks.arm.counting import Count
from benchmarks.arm.engines import KernelCount, Measured
from benchmarks.arm_instructions import Result


def result(network: str, engine: str, count: Count | None, cpu: str = "cortex-a72", **fields) -> Result:
    measured = Measured(count, 0.0, kernels=fields.pop("kernels", ())) if count else None
    return Result(network, cpu, fields.pop("precision", "fp32"), engine, 12_000_000, measured, **fields)


KERNELS = (
    KernelCount("fused_conv", ("stem", "stem2"), "conv2d", 11_000_000, Count(2.5e6, 2e6, 3e5, 1e5)),
    KernelCount("transpose", (), "elementwise", 0, Count(1e5, 0, 5e4, 5e4)),
)
RESULTS = [
    result("a", "nnfuze", Count(3e6, 2e6, 5e5, 2e5), kernels=KERNELS),
    result("a", "onnxruntime", Count(6e6, 3e6, 2e6, 1e6)),
    result("a", "ncnn", Count(4.5e6, 3e6, 1e6, 2e5)),
    result("b", "nnfuze", Count(4e6)),
    result("b", "onnxruntime", Count(2e6)),
    result("b", "ncnn", None, reason="does not convert"),
    result("b", "nnfuze", Count(4e6), cpu="max"),
]


def lines(table, width: int = 160) -> list[list[str]]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    rows = [line.strip("│") for line in captured.get().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.split("│")] for row in rows]


def test_ratios_are_to_the_peer_with_the_fewest_instructions_on_the_same_cpu():
    assert arm_instructions.ratios(RESULTS) == {
        ("a", "cortex-a72", "fp32"): pytest.approx(1.5),
        ("b", "cortex-a72", "fp32"): pytest.approx(0.5),
    }


def test_the_tables_show_rates_kinds_kernels_and_what_is_missing():
    assert lines(arm_instructions.render(RESULTS)) == [
        ["a", "cortex-a72", "fp32", "12 M", "4.00", "2.00", "2.67", "1.50×"],
        ["b", "cortex-a72", "fp32", "12 M", "3.00", "6.00", "–", "0.50×"],
        ["b", "max", "fp32", "12 M", "3.00", "–", "–", "–"],
    ]
    kinds = lines(arm_instructions.render_classes(RESULTS))
    assert kinds[0] == ["a", "cortex-a72", "fp32", "3 M", "67 %", "17 %", "7 %", "10 %", "6.00", "0.25"]
    assert lines(arm_instructions.render_kernels(RESULTS[0])) == [
        ["stem + stem2", "conv2d", "11 M", "83.3 %", "2.5 M", "80 %", "12 %", "4 %", "4 %", "5.50", "0.15", "4.40"],
        ["transpose", "elementwise", "", "3.3 %", "100 k", "0 %", "50 %", "50 %", "0 %", "", "", ""],
        ["around the kernels", "", "", "13.3 %", "400 k", "0 %", "38 %", "12 %", "50 %", "", "", ""],
    ]
    assert arm_instructions.footnotes(RESULTS) == ["ncnn, fp32: does not convert (b on cortex-a72)"]


def test_the_document_holds_everything():
    document = json.loads(json.dumps(arm_instructions.as_json(RESULTS)))
    first = document["results"][0]
    assert first["macs_per_instruction"] == 4.0
    assert first["measured"]["kernels"][0]["count"] == {
        "instructions": 2.5e6,
        "multiply": 2e6,
        "load": 3e5,
        "store": 1e5,
    }
    assert document["results"][5]["macs_per_instruction"] is None
    assert document["ratios"][0] == {
        "network": "a",
        "cpu": "cortex-a72",
        "precision": "fp32",
        "best_peer_over_ours": pytest.approx(1.5),
    }
    assert {"apache-tvm", "onnxruntime", "ncnn"} <= document["versions"].keys()


def test_blocks_are_found_in_the_file_they_are_mapped_from():
    maps = """
5500000000-5500100000 r-xp 00000000 fe:00 1    /root/usr/bin/python3.11
5500200000-5500201000 r--p 00000000 fe:00 2    /srv/lib.so
5500201000-5500300000 r-xp 00001000 fe:00 2    /srv/lib.so
5500400000-5500500000 r-xp 00000000 fe:00 3    /site/numpy/_core/umath.so
5500600000-5500700000 r-xp 00000000 00:00 0
"""
    counts = "5500201010 10 5 2 1 1\n5500000100 7 3 0 1 0\n5500400000 100 9 0 0 0\n5500600004 2 2 0 0 1\n"
    found = counting.blocks(counts, maps)
    assert [(b.file, b.address, b.runs) for b in found[:2]] == [
        ("/srv/lib.so", 0x1010, 10),
        ("/root/usr/bin/python3.11", 0x100, 7),
    ]
    assert found[0].count == Count(50, 20, 10, 10)
    assert counting.without_interpreter(found) == Count(54, 20, 10, 12)


def test_functions_are_read_from_a_librarys_symbols(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "two.c", tmp_path / "two.so"
    source.write_text(
        "static __attribute__((noinline)) int first(int x) { return 3 * x; }\n"
        "int second(int x) { return first(x) + 1; }\n"
    )
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    symbols = {name: address for address, name in counting.functions(library)}
    assert 0 < symbols["first"] < symbols["second"]
    block = counting.Block(str(library), symbols["second"] + 1, 2, Count(8, 1, 2, 3))
    elsewhere = counting.Block("/other.so", symbols["first"], 2, Count(8))
    counts = counting.by_function([block, elsewhere, block], library)
    assert counts == {"second": Count(16, 2, 4, 6)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cpus", "cortex-a9"], "'cortex-a9'"),
        (["--precision", "int4"], "'int4'"),
        (["--peers", "openvino"], "'openvino'"),
        (["--networks", "resnet8+resnet8"], "one network at a time"),
        (["--networks", "resnet9"], "resnet9: no such network or file"),
        (["--plot", "figure.docx"], "use a file name that ends in .png"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path):
    try:
        code = arm_instructions.main([*arguments, "--work-dir", str(tmp_path / "work")])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error" in last and message in last
    assert not (tmp_path / "work").exists()


def test_the_figure_holds_every_network_and_engine(tmp_path):
    pytest.importorskip("matplotlib").rcParams["svg.fonttype"] = "none"
    file = tmp_path / "figure.svg"
    arm_instructions.draw(file, RESULTS)
    drawn = file.read_text()
    for expected in ("cortex-a72, fp32", "max, fp32", "nnfuze", "onnxruntime", "ncnn", ">a<", ">b<"):
        assert expected in drawn
