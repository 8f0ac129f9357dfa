"""Which lane and register holds which element of a tensor core's operands: the emulator against NVIDIA's own layouts.

CuTe, in the package nvidia-cutlass, describes each instruction by layouts (a lane and an element's number give a
position) in its headers for C++. They are read from there and evaluated with ``pycute``, CuTe's layout algebra in
Python, so that nothing of what is compared was written here. An instruction is judged by its effect: registers are
filled by CuTe's layouts, the emulator runs it, and the result is read by CuTe's layouts again.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load_tool

pycute = pytest.importorskip("pycute", reason="nvidia-cutlass (requirements-no-deps.txt) is not installed")

ATOMS = Path(pycute.__file__).parents[1] / "cutlass_library" / "source" / "include" / "cute" / "atom"
MMA = {
    "bf16": ("SM80_16x8x16_F32BF16BF16F32_TN", torch.bfloat16),
    "f16": ("SM80_16x8x16_F32F16F16F32_TN", torch.float16),
    "tf32": ("SM80_16x8x8_F32TF32TF32F32_TN", torch.float32),
}
# The four of `ldmatrix_kernel` in tests/simt/primitives.cpp, in its order, with the registers that each fills.
LDMATRIX = {"SM75_U32x4_LDSM_N": 4, "SM75_U16x8_LDSM_T": 4, "SM75_U32x2_LDSM_N": 2, "SM75_U16x4_LDSM_T": 2}


def parse_layout(text: str) -> Any:
    """``Layout<Shape<_4,_8>, Stride<_8,_1>>`` of C++ as pycute's."""
    match = re.fullmatch(r"Layout<(.*)>", re.sub(r"\s+", "", text))
    assert match is not None, text
    inner = re.sub(r"(Shape|Stride)<", "(", match[1]).replace(">", ",)")
    shape, stride = ast.literal_eval(re.sub(r"_(\d+)", r"\1", inner))
    return pycute.Layout(shape, stride)


def trait(file: str, structure: str, name: str) -> Any:
    """The layout `name` of a specialisation such as ``MMA_Traits<...>``, its own or the one that it inherits."""
    text = (ATOMS / file).read_text()
    match = re.search(rf"struct {re.escape(structure)}\s*(?::\s*(\w+<\w+>))?\s*\{{(.*?)^\}};", text, re.S | re.M)
    assert match is not None, structure
    if own := re.search(rf"using {name}\s*=\s*(.*?);", match[2], re.S):
        alias = re.search(rf"using {re.escape(own[1])}\s*=\s*(.*?);", text, re.S)
        return parse_layout(alias[1] if alias else own[1])
    return trait(file, match[1], name)


@pytest.fixture(scope="module")
def program() -> Path:
    return load_tool("simt_tests").build("none", "attnfast_simt_primitives") / "attnfast_simt_primitives"


def run(program: Path, instruction: str, text: str = "") -> list[str]:
    return subprocess.run(
        [str(program), instruction], input=text, capture_output=True, text=True, check=True
    ).stdout.split()


def bits_of(x: torch.Tensor) -> int:
    return int(x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)) & (2 ** (8 * x.element_size()) - 1)


@pytest.mark.parametrize("name", list(MMA))
def test_mma(program: Path, name: str) -> None:
    atom, dtype = MMA[name]
    layout_a, layout_b, layout_c = (trait("mma_traits_sm80.hpp", f"MMA_Traits<{atom}>", f"{x}Layout") for x in "ABC")
    inner = layout_a.size() // 16
    assert (layout_a.size(), layout_b.size(), layout_c.size()) == (16 * inner, 8 * inner, 128)
    # Whole numbers, exact in every type and in their sums; drawn, so that no other map gives the same result.
    a, b, c = (torch.randint(-8, 9, shape) for shape in ((16, inner), (8, inner), (16, 8)))
    of_columns = [x.T.flatten().to(dtype) for x in (a, b)]  # CuTe counts down the columns

    def words(lane: int, layout: Any, values: torch.Tensor) -> list[int]:
        count = layout.size() // 32
        found = [bits_of(values[layout(lane, e)].clone()) for e in range(count)]
        return found if dtype == torch.float32 else [x | y << 16 for x, y in zip(found[::2], found[1::2])]

    lines = []
    for lane in range(32):
        registers = [*words(lane, layout_a, of_columns[0]), *words(lane, layout_b, of_columns[1])]
        assert len(registers) == 6
        numbers = [float(c.T.flatten()[layout_c(lane, e)]) for e in range(4)]
        lines.append(" ".join([*(f"{x:x}" for x in registers), *map(str, numbers)]))
    found = [float(x) for x in run(program, name, "\n".join(lines))]
    result = torch.full((128,), torch.nan)
    for lane in range(32):
        for e in range(4):
            result[layout_c(lane, e)] = found[4 * lane + e]
    assert torch.equal(result.view(8, 16).T, (a @ b.T + c).float())


def test_ldmatrix(program: Path) -> None:
    found = [int(x) for x in run(program, "ldmatrix")]
    assert len(found) == 32 * 12
    first = 0
    for atom, registers in LDMATRIX.items():
        source, target = (trait("copy_traits_sm75.hpp", f"Copy_Traits<{atom}>", x) for x in ("SrcLayout", "DstLayout"))
        # Lane i points to the eight numbers of 16 bits from 8 i on, and only 8 lanes a matrix do.
        memory = {
            source(lane, bit): (8 * lane + bit // 16, bit % 16) for bit in range(128) for lane in range(8 * registers)
        }
        for lane in range(32):
            for bit in range(32 * registers):
                number, place = memory[target(lane, bit)]
                word = found[12 * lane + first + bit // 32]
                assert word >> bit % 32 & 1 == number >> place & 1, f"{atom}: lane {lane}, bit {bit}"
        first += registers


def test_tf32_operands_as_the_kernels_read_them() -> None:
    """The addresses of csrc/cuda/device/mma_tiles.cuh against CuTe's layouts.

    32-bit elements by ldmatrix, and the order of keys in which weights are A fragments as they are.
    """
    layout_a, layout_b, layout_c = (
        trait("mma_traits_sm80.hpp", f"MMA_Traits<{MMA['tf32'][0]}>", f"{x}Layout") for x in "ABC"
    )
    source, target = (
        trait("copy_traits_sm75.hpp", "Copy_Traits<SM75_U32x4_LDSM_N>", x) for x in ("SrcLayout", "DstLayout")
    )
    pointed = {source(lane, bit): (lane, bit // 32) for bit in range(0, 128, 32) for lane in range(32)}
    for lane in range(32):
        for register in range(4):
            pointer, element = pointed[target(lane, 32 * register)]
            # own_fragment: lane i points to row i % 16, chunk i / 16.
            row, column = pointer % 16, 4 * (pointer // 16) + element
            assert layout_a(lane, register) == row + 16 * column
            # multiply_step: lane i points to row i % 8 + 8 (i / 16), chunk i / 8 % 2; two fragments.
            row, column = pointer % 8 + pointer // 16 * 8, 4 * (pointer // 8 % 2) + element
            assert layout_b(lane, register % 2) == row % 8 + 8 * column and row // 8 == register // 2
        # add_weighted_rows: C elements 0, 2, 1, 3 are the A fragment; B is read from rows 2 t and 2 t + 1, feature g.
        key_of = {layout_a(lane, i) // 16: layout_c(lane, e) // 16 for i, e in enumerate((0, 2, 1, 3))}
        assert all(layout_a(lane, i) % 16 == layout_c(lane, e) % 16 for i, e in enumerate((0, 2, 1, 3)))
        for register in range(2):
            feature, place = layout_b(lane, register) % 8, layout_b(lane, register) // 8
            assert (feature, key_of[place]) == (lane // 4, 2 * (lane % 4) + register)


def test_layouts_are_read_as_they_are_written() -> None:
    layout = parse_layout("Layout<Shape <Shape < _4,_8>,_2>,\n   Stride<Stride< _8,_1>,_32>>")
    assert (layout.shape, layout.stride) == (((4, 8), 2), ((8, 1), 32))
