"""The counting plugin on programs whose instructions are known one by one."""

import json
import subprocess

import onnx
import pytest

from benchmarks import arm_instructions
from benchmarks.arm import counting, engines
from benchmarks.arm.counting import Count
from benchmarks.engines.onnxruntime import reference
from benchmarks.workloads import workload
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.devices.toolchain import linker_for
from tests.tiny_networks import classifier

MULTIPLY = """
fmla v1.4s, v0.4s, v2.s[1]
fmla v1.4s, v0.4s, v2.4s
fmls v1.2d, v0.2d, v2.2d
fmla v1.8h, v0.8h, v2.8h
fmla v1.8h, v0.8h, v2.h[3]
fmul v1.4s, v0.4s, v2.4s
fmul v1.8h, v0.8h, v2.8h
fmul s1, s0, s2
fmul s1, s0, v2.s[1]
fmulx v1.4s, v0.4s, v2.4s
fmadd s1, s0, s2, s3
fnmsub d1, d0, d2, d3
fmlal v1.4s, v0.4h, v2.4h
bfmmla v1.4s, v0.8h, v2.8h
bfdot v1.4s, v0.8h, v2.8h
mul v1.8h, v0.8h, v2.8h
mul v1.4s, v0.4s, v2.s[0]
mla v1.16b, v0.16b, v2.16b
mls v1.4s, v0.4s, v2.4s
smull v1.8h, v0.8b, v2.8b
smull2 v1.4s, v0.8h, v2.h[1]
smlal v1.4s, v0.4h, v2.4h
smlal2 v1.8h, v0.16b, v2.16b
umlal v1.4s, v0.4h, v2.h[7]
umlsl v1.4s, v0.4h, v2.4h
sqdmulh v1.4s, v0.4s, v2.4s
sqrdmulh v1.4s, v0.4s, v2.s[2]
sqdmull v1.4s, v0.4h, v2.4h
sqrdmlah v1.4s, v0.4s, v2.4s
sdot v1.4s, v0.16b, v2.16b
sdot v1.4s, v0.16b, v2.4b[3]
udot v1.4s, v0.16b, v2.4b[0]
usdot v1.4s, v0.16b, v2.16b
smmla v1.4s, v0.16b, v2.16b
usmmla v1.4s, v0.16b, v2.16b
"""
LOAD = """
ldr q0, [x1]
ldr q0, [x1], #16
ldr d0, [x1, x2]
ldr b0, [x1, #1]
ldur q0, [x1, #-16]
ldr x3, [x1]
ldrsw x3, [x1]
ldrsb w3, [x1, #3]
ldrh w3, [x1]
ldp q6, q7, [x1]
ldp x3, x4, [x1], #16
ldpsw x3, x4, [x1]
ldnp q6, q7, [x1]
ld1 {v1.16b, v2.16b, v3.16b, v4.16b}, [x1]
ld1 {v1.s}[2], [x1]
ld1r {v1.4s}, [x1]
ld2 {v1.4s, v2.4s}, [x1]
ldr q0, buffer
ldar w3, [x1]
ldxr w3, [x1]
ldapr w3, [x1]
ldadd w3, w4, [x1]
"""
STORE = """
str q0, [x1]
str q0, [x1, #32]!
str s0, [x1, x2, lsl #2]
stur q0, [x1, #-16]
str x3, [x1]
strb w3, [x1]
stp q6, q7, [x1]
stp x3, x4, [x1, #16]
stnp q6, q7, [x1]
st1 {v1.4s, v2.4s}, [x1]
st1 {v1.s}[2], [x1]
st2 {v1.4s, v2.4s}, [x1]
stlr w3, [x1]
stxr w5, w3, [x1]
"""
OTHER = """
fadd v1.4s, v0.4s, v2.4s
fdiv s1, s0, s2
fmax v1.4s, v0.4s, v2.4s
fcmeq v1.4s, v0.4s, v2.4s
frecps v1.4s, v0.4s, v2.4s
facge v1.4s, v0.4s, v2.4s
fcvtns v1.4s, v0.4s
fcadd v1.4s, v0.4s, v2.4s, #90
add v1.4s, v0.4s, v2.4s
addv s1, v0.4s
sadalp v1.4s, v0.8h
saddlp v1.4s, v0.8h
saddw v1.4s, v0.4s, v2.4h
sabal v1.4s, v0.4h, v2.4h
sabdl v1.4s, v0.4h, v2.4h
smax v1.4s, v0.4s, v2.4s
dup v1.4s, v0.s[1]
dup v1.4s, w3
ext v1.16b, v0.16b, v2.16b, #4
zip1 v1.4s, v0.4s, v2.4s
tbl v1.16b, {v0.16b}, v2.16b
sxtl v1.8h, v0.8b
sqxtn v1.8b, v0.8h
shl v1.4s, v0.4s, #3
movi v1.4s, #1
fmov s1, #1.0
fmov w3, s1
madd x3, x4, x5, x6
mul x3, x4, x5
add x3, x4, #1
prfm pldl1keep, [x1]
nop
"""
CLASSES = {"multiply": MULTIPLY, "load": LOAD, "store": STORE, "other": OTHER}
CASES = [(line, kind) for kind, lines in CLASSES.items() for line in lines.strip().splitlines()]

MARK = "mov x8, #28262\nsvc #0\n"
PROGRAM = """
.arch armv8.6-a+fp16+i8mm+bf16+dotprod+rcpc
.arch_extension fp16fml
.globl _start
_start:
mov x0, #0
{mark}{body}
mov x0, #1
{mark}
mov x0, #0
mov x8, #93
svc #0
.balign 16
buffer: .space 16
pointer: .quad memory
.bss
.balign 64
.space 64
memory: .space 4096
"""


@pytest.fixture(scope="module")
def blocks_of(tmp_path_factory):
    """Return what assembles a program, runs it on the CPU with everything, and gives its blocks in order."""
    folder = tmp_path_factory.mktemp("counting")
    plugin = counting.plugin(folder)

    def run(body: str) -> list[counting.Block]:
        source, program, counts = folder / "program.S", folder / "program", folder / "counts"
        source.write_text(PROGRAM.format(mark=MARK, body=body))
        linker = linker_for(resolve("aarch64")).command
        subprocess.run([*linker, "-nostdlib", "-static", "-o", program, source], check=True)
        subprocess.run(["qemu-aarch64", "-cpu", "max", "-plugin", f"{plugin},out={counts}", program], check=True)
        return sorted(counting.blocks(counts.read_text(), ""), key=lambda block: block.address)

    return run


def test_every_instruction_is_of_its_class(blocks_of):
    body = "".join(f"ldr x1, pointer\nmov x2, #0\nb 1f\n1: {line}\nb 1f\n1:\n" for line, _ in CASES)
    # Each instruction, with the branch behind it, is a block of its own, the second of two.
    found = blocks_of(body)[1::2]
    assert [block.runs for block in found] == [1] * len(CASES)
    for (line, kind), block in zip(CASES, found, strict=True):
        classes = {name: getattr(block.count, name) for name in CLASSES}
        assert classes == {**dict.fromkeys(CLASSES, 0), "other": 1, kind: 1 + (kind == "other")}, line


def test_a_loop_is_counted_exactly(blocks_of):
    body = """
    mov x9, #1000
    1: fmla v1.4s, v0.4s, v0.s[1]
    smull v2.8h, v0.8b, v0.8b
    smlal2 v2.8h, v0.16b, v0.16b
    sadalp v3.4s, v2.8h
    ldr q0, buffer
    ldr q1, buffer
    sub sp, sp, #32
    stp q1, q0, [sp]
    add sp, sp, #32
    subs x9, x9, #1
    b.ne 1b
    """
    total = sum((block.count for block in blocks_of(body)), Count())
    # Before the loop one instruction, behind it the three that say it is over.
    assert total == Count(1 + 11 * 1000 + 3, 3 * 1000, 2 * 1000, 1000)
    assert total.other == 4 + 5 * 1000


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "int8"])
def test_a_network_executes_the_same_in_every_inference(tmp_path, precision):
    model = tmp_path / "net.onnx"
    onnx.save(classifier(shape=(1, 2, 16, 16)), model)
    work = workload(str(model), tmp_path)
    exact = reference(work)
    ours = engines.Ours(work, precision, tmp_path)
    measured = ours.measure("cortex-a76", exact)
    assert measured.error < (1e-4 if precision == "fp32" else 0.1)
    assert engines.macs(work) == 16 * 16 * 8 * 2 * 9 + 3 * 8
    layers = {layer: kernel.macs for kernel in measured.kernels for layer in kernel.layers}
    assert layers == {"conv": 16 * 16 * 8 * 2 * 9, "dense_scores": 24}
    library = next(tmp_path.rglob("lib.so"))
    kernels = sum((kernel.count for kernel in measured.kernels), Count())
    for inferences in (1, 5):
        inputs = list(work.evaluation[0][0].values())
        blocks, _ = counting.run("cortex-a76", "nnfuze", library, inputs, inferences, work_dir=tmp_path)
        inside = {name: count / inferences for name, count in counting.by_function(blocks, library).items()}
        named = {name: c for name, c in inside.items() if any(k.name in name for k in measured.kernels)}
        assert sum(named.values(), Count()) == kernels
    assert kernels.multiply * 4 * (1 if precision == "fp32" else 4) >= 16 * 16 * 8 * 2 * 9
    assert kernels.instructions < measured.count.instructions < kernels.instructions + 100_000


# An emulated ONNX Runtime takes most of a minute to start.
@pytest.mark.slow
def test_ours_beside_onnx_runtime_is_counted_once(tmp_path, capsys, monkeypatch):
    onnx.save(classifier(shape=(1, 2, 16, 16)), tmp_path / "net.onnx")
    file = tmp_path / "figures.json"
    arguments = ["--networks", str(tmp_path / "net.onnx"), "--cpus", "cortex-a72", "--precision", "fp32"]
    arguments += ["--peers", "onnxruntime", "--kernels", "--json", str(file), "--work-dir", str(tmp_path / "work")]
    assert arm_instructions.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "onnxruntime 1.23.2" in printed and "around the kernels" in printed
    document = json.loads(file.read_text())
    ours, theirs = document["results"]
    assert (ours["engine"], theirs["engine"]) == ("nnfuze", "onnxruntime")
    assert ours["measured"]["error"] < 1e-5 and theirs["measured"]["error"] < 1e-5
    executed = [r["measured"]["count"]["instructions"] for r in (ours, theirs)]
    assert ours["macs_per_instruction"] == ours["macs"] / executed[0]
    assert document["ratios"][0]["best_peer_over_ours"] == pytest.approx(executed[1] / executed[0])
    monkeypatch.setattr(counting, "run", None)
    assert arm_instructions.main(arguments) == 0
    assert json.loads(file.read_text()) == document
