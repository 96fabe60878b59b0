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

from hf_efficient.kernels import block_sparse, block_sparse_backward, linear_attention, linear_attention_backward  # noqa: E402
from hf_efficient.kernels.configs import CONFIGS, LINEAR_CONFIGS, Tile, config_for  # noqa: E402

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
    """One compilation: grouped heads, padding, segments, lengths that fill no tile; with a bias, or positions and a cap."""

    arch: str
    precision: str
    width: int
    kernel: str
    has_bias: bool

    def __str__(self) -> str:
        return "-".join(str(x) for x in self)


def _is_left_to_the_other(arch: str, precision: str, width: int, kernel: str) -> bool:
    """Float32 tiles that both architectures have are compiled for one of them, in turn over kernels and widths."""
    same = len({getattr(CONFIGS[name, precision, width], kernel) for name in SHARED}) == 1
    turn = list(SHARED)[(list(KERNELS).index(kernel) + (width == 128)) % 2]
    return precision != "half" and same and arch != turn


# capped logits where registers are scarcest
BUILDS = [
    Build(arch, precision, width, kernel, has_bias)
    for arch, precision, width in CONFIGS
    for kernel in KERNELS
    for has_bias in (True, False)
    if not _is_left_to_the_other(arch, precision, width, kernel)
    if has_bias or (precision == "half" and kernel != "bias_gradient" and (width == 128 or kernel == "key_gradient"))
]


def _type(name: str, dtype: str) -> str:
    if name in ("Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV"):
        return f"*{dtype}"
    if name in ("LSE", "DELTA", "PART", "PART_LSE", "PART_K", "PART_V", "BIAS", "DBIAS"):
        return "*fp32"
    if name in ("MASKS", "KEEP"):
        return "*u8"
    if name in ("qk_scale", "cap", "scaling"):
        return "fp32"
    return "*i32" if name.isupper() and name not in ("N", "S") else "i32"


def uses_tf32(build: Build) -> bool:
    return build.precision == "tf32" and build.kernel != "bias_gradient"


def compiled(build: Build) -> tuple[Any, Tile]:
    """The compiled kernel, its pointers and strides declared divisible by 16 as they are at run time."""
    function = KERNELS[build.kernel]
    config = config_for(build.arch, build.precision, build.width, is_capped=not build.has_bias)
    tile: Tile = getattr(config, build.kernel)
    constants: dict[str, Any] = dict(
        H=12, HK=4, PER_HEAD=False, EVEN_N=False, EVEN_S=False, BM=tile.block_q, BN=tile.block_k,
        D=build.width, BD=build.width, PRECISION="tf32" if uses_tf32(build) else "ieee", UP=False,
    )  # fmt: skip
    # a bias and positions exclude each other
    constants |= dict.fromkeys(("QPOS", "KPOS", "cap") if build.has_bias else ("BIAS",))
    dtype = "bf16" if build.precision == "half" else "fp32"
    names = function.arg_names
    constants = {name: x for name, x in constants.items() if name in names}
    types = {name: "constexpr" if name in constants else _type(name, dtype) for name in names}
    return compile_for(build.arch, function, types, constants, tile.warps, tile.stages), tile


def compile_for(
    arch: str, function: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int
) -> Any:
    names = function.arg_names
    divisible = [n for n, t in types.items() if t.startswith("*") or re.fullmatch(r"s[qkvogdxae][bh]?", n)]
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={(names.index(name),): x for name, x in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=dict(num_warps=warps, num_stages=stages))


def assert_within_resources(kernel: Any, arch: str, expected: str, folder: Path, what: str) -> None:
    """No spills, bounded shared memory, and the `expected` instruction."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True)
    code = subprocess.run([TOOLS / "nvdisasm", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage.stdout
    registers, stack = int(found[1]), int(found[2])
    shared = kernel.metadata.shared / 1024
    print(f"{what}: {registers} registers, {stack} B stack, {shared:.0f} KiB")
    assert stack == 0 and not re.search(r"\b(LDL|STL)", code), f"{registers} registers and {stack} B of spills"
    assert shared <= SHARED[arch], f"{shared:.0f} KiB of shared memory"
    assert re.search(rf"\b{expected}", code), f"no {expected}: the kernel does not run on the units that it should"


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_shipped_config_compiles_within_its_resources(build: Build, tmp_path: Path):
    kernel, tile = compiled(build)
    # the tiles of float32 are too small for Hopper's own instruction
    if build.precision == "half":
        expected = "HGMMA" if build.arch == "sm_90" else "HMMA"
    else:
        expected = "HG?MMA" if uses_tf32(build) else "FFMA"
    assert_within_resources(kernel, build.arch, expected, tmp_path, f"{build} {tuple(tile)}")


# ---- linear attention ----------------------------------------------------------------------------------------------

LINEAR_KERNELS = {
    "chunk_states": linear_attention.chunk_states,
    "scan": linear_attention.scan,
    "forward": linear_attention.forward,
    "query_gradient": linear_attention_backward.query_gradient,
    "key_gradient": linear_attention_backward.key_gradient,
}


class LinearBuild(NamedTuple):
    """One compilation, with states and, in `chunk_states`, with what the backward pass adds."""

    arch: str
    precision: str
    width: int
    features: int
    kernel: str

    def __str__(self) -> str:
        return "-".join(str(x) for x in self)


# both numbers of features where speed matters most; in float32 nothing differs between the architectures
LINEAR_BUILDS = [
    LinearBuild(arch, precision, width, features, kernel)
    for arch, precision, width in LINEAR_CONFIGS
    for features in (64, 256)
    for kernel in LINEAR_KERNELS
    if (precision == "tf32" or arch == "sm_80")
    and (features == 256 or (precision == "tf32" and width == 64))
    and (kernel not in ("chunk_states", "scan") or (features == 256 and width == 64 and precision == "tf32"))
]


@pytest.mark.parametrize("build", LINEAR_BUILDS, ids=str)
def test_linear_attention_compiles_within_its_resources(build: LinearBuild, tmp_path: Path):
    function, config = LINEAR_KERNELS[build.kernel], LINEAR_CONFIGS[build.arch, build.precision, build.width]
    # the states of all kernels are summed by one, with the tile of each
    tile = getattr(config, "forward" if build.kernel in ("chunk_states", "scan") else build.kernel)
    constants: dict[str, Any] = dict(
        C=tile.chunk, M=build.features, BK=tile.slice, D=build.width, BD=build.width, R=config.scanned,
        LAST_FIRST=True, PRECISION=build.precision,
    )  # fmt: skip
    constants = {name: x for name, x in constants.items() if name in function.arg_names}
    value = "*bf16" if build.precision == "tf32" else "*fp32"
    types = {
        name: "constexpr"
        if name in constants
        else value
        if name in ("V", "DV")
        else "*fp32"
        if name.isupper() and name not in ("N", "H")
        else "i32"
        for name in function.arg_names
    }
    warps = 4 if build.kernel in ("chunk_states", "scan") else tile.warps
    kernel = compile_for(build.arch, function, types, constants, warps, 1)
    expected = "FFMA" if build.precision == "ieee" or build.kernel == "scan" else "HG?MMA"
    assert_within_resources(kernel, build.arch, expected, tmp_path, f"{build} {tuple(tile)}")
