"""Long names are cut to what tells them apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nnfuze_tvm.report.names import MOST, short_names

PATH = "net/StatefulPartitionedCall/model_1/mobilenetv2_1.00_96"


def test_short_names_stay() -> None:
    assert short_names(["net/conv1/Conv", "net/conv2/Conv"]) == {n: n for n in ("net/conv1/Conv", "net/conv2/Conv")}


def test_the_task_and_the_end_of_the_path_stay() -> None:
    names = [f"{PATH}/block_{n}_expand/Conv2D" for n in range(17)]
    assert list(short_names(names).values()) == [f"net/…/block_{n}_expand/Conv2D" for n in range(17)]


def test_the_first_of_several_joined_names() -> None:
    joined = f"{PATH}/block_1_expand/Conv2D;{PATH}/block_1_expand_BN/FusedBatchNormV3"
    assert short_names([joined])[joined] == "net/…/block_1_expand/Conv2D"


def test_equal_ends() -> None:
    names = [f"net/{'encoder/' * 6}{n}/attention/self/query/MatMul" for n in range(3)]
    assert list(short_names(names).values()) == [f"net/…/{n}/attention/self/query/MatMul" for n in range(3)]
    far = [f"{where}/{'x/' * 30}conv" for where in ("left", "right")]
    left, right = short_names(far).values()
    assert (left[:7], right[:8]) == ("left/…/", "right/…/")


def test_kernels_without_paths() -> None:
    names = [f"fused_conv2d_add_cast_multiply_round_clip_cast{n}_transpose" for n in range(12)]
    found = short_names(names)
    assert all(len(name) <= MOST for name in found.values())
    assert found[names[3]].endswith("cast3_transpose")


@given(st.lists(st.text("ab/;_", max_size=90), unique=True, max_size=12))
def test_no_two_become_one(names: list[str]) -> None:
    found = short_names(names)
    assert list(found) == names
    assert len(set(found.values())) == len(names)
    assert all(len(found[name]) <= max(MOST, len(name)) for name in names)
    assert all(found[name] == name for name in names if len(name) <= MOST)
