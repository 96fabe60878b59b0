"""Every shipped kernel configuration, compiled without a GPU: no spills, tensor cores, bounded shared memory."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hf_efficient.kernels import block_sparse, block_sparse_backward  # noqa: E402
from hf_efficient.kernels.configs import CONFIGS, Tile  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# KiB of one block; the configs of 8.0 also serve 8.6 to 12.0, which have less than 8.0 itself
SHARED = {"sm_80": 99, "sm_90": 227}
KERNELS = {
    "forward": block_sparse.forward,
    "query_gradient": block_sparse_backward.query_gradient,
    "key_gradient": block_sparse_backward.key_gradient,
    "bias_gradient": block_sparse_backward.bias_gradient,
}


class Build(NamedTuple):
    """One compilation, with padding, segments, lengths that fill no tile, and positions where there is no bias."""

    arch: str
    precision: str
    width: int
    kernel: str
    has_bias: bool

    def __str__(self) -> str:
        return "-".join(str(x) for x in self)


# both with and without a bias where speed matters most
BUILDS = [
    Build(arch, precision, width, kernel, has_bias)
    for arch, precision, width in CONFIGS
    for kernel in KERNELS
    for has_bias in (True, False)
    if has_bias or (precision == "half" and kernel != "bias_gradient")
]


def _type(name: str, dtype: str) -> str:
    if name in ("Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV"):
        return f"*{dtype}"
    if name in ("LSE", "DELTA", "PART", "PART_LSE", "PART_K", "PART_V", "BIAS", "DBIAS"):
        return "*fp32"
    if name in ("MASKS", "KEEP"):
        return "*u8"
    if name in ("qk_scale", "scaling"):
        return "fp32"
    return "*i32" if name.isupper() and name not in ("N", "S") else "i32"


def uses_tf32(build: Build) -> bool:
    return build.precision == "tf32" and build.kernel != "bias_gradient"


def compiled(build: Build) -> tuple[Any, Tile]:
    """The compiled kernel, its pointers and strides declared divisible by 16 as they are at run time."""
    function = KERNELS[build.kernel]
    tile: Tile = getattr(CONFIGS[build.arch, build.precision, build.width], build.kernel)
    constants: dict[str, Any] = dict(
        H=12, HK=12, PER_HEAD=False, EVEN_N=False, EVEN_S=False, BM=tile.block_q, BN=tile.block_k,
        D=build.width, BD=build.width, PRECISION="tf32" if uses_tf32(build) else "ieee", UP=False,
    )  # fmt: skip
    # a bias and positions exclude each other
    constants |= dict.fromkeys(("QPOS", "KPOS") if build.has_bias else ("BIAS",))
    dtype = "bf16" if build.precision == "half" else "fp32"
    names = function.arg_names
    constants = {name: x for name, x in constants.items() if name in names}
    types = {name: "constexpr" if name in constants else _type(name, dtype) for name in names}
    divisible = [n for n, t in types.items() if t.startswith("*") or re.fullmatch(r"s[qkvogd][bh]?", n)]
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={(names.index(name),): x for name, x in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    target = GPUTarget("cuda", int(build.arch.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=dict(num_warps=tile.warps, num_stages=tile.stages)), tile


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_shipped_config_compiles_within_its_resources(build: Build, tmp_path: Path):
    kernel, tile = compiled(build)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True)
    code = subprocess.run([TOOLS / "nvdisasm", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage.stdout
    registers, stack = int(found[1]), int(found[2])
    shared = kernel.metadata.shared / 1024
    print(f"{build} {tuple(tile)}: {registers} registers, {stack} B stack, {shared:.0f} KiB")
    assert stack == 0 and not re.search(r"\b(LDL|STL)", code), f"{registers} registers and {stack} B of spills"
    assert shared <= SHARED[build.arch], f"{shared:.0f} KiB of shared memory"
    # the tiles of float32 are too small for Hopper's own instruction
    if build.precision == "half":
        expected = "HGMMA" if build.arch == "sm_90" else "HMMA"
    else:
        expected = "HG?MMA" if uses_tf32(build) else "FFMA"
    assert re.search(rf"\b{expected}", code), f"no {expected}: the dots do not run on the units that they should"
