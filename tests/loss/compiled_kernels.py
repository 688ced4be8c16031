"""Compile the loss's kernels for a GPU that need not be here: `python -m tests.loss.compiled_kernels CAPABILITY`.

Prints name, registers per thread and bytes of spilled registers of each variant, one a line.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clip_train.loss import kernels

OBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLOATS = (
    "products", "scale", "bias", "row_bias", "column_bias", "row_parts", "column_parts", "own_logits", "sums", "parts",
    "maximum", "total", "row_log_sum", "column_log_sum", "counted",
)  # fmt: skip
# Numbers of a tile of 4,096 x 8,192 are multiples of 16, which is what the launcher specializes on.
EVEN = ("num_rows", "num_columns", "num_lines")


def usage(kernel, *, absent=(), gradient="*bf16", capability, **options):
    """Registers and bytes of stack of a kernel without the arguments `absent`."""
    types = dict.fromkeys(FLOATS, "*fp32") | {"row_ids": "*i64", "column_ids": "*i64", "gradient": gradient}
    warps = options.pop("num_warps")
    signature, constants, hints = {}, {}, {}
    for i, name in enumerate(parameter.name for parameter in kernel.params):
        if name in options or name in absent:
            signature[name] = "constexpr"
            constants[(i,)] = options.get(name)
            continue
        signature[name] = types.get(name, "i32")
        if name in EVEN or signature[name].startswith("*"):
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run([OBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return [int(re.search(rf"{what}:(\d+)", told)[1]) for what in ("REG", "STACK")]


def main(capability):
    for padded, repeated in itertools.product((False, True), repeat=2):
        absent = [] if padded else ["row_bias", "column_bias"]
        absent += [] if repeated else ["row_ids", "column_ids"]
        given = {"capability": capability}
        print("sums", *usage(kernels._sum_block, absent=[*absent, "bias"], **given, **kernels._SUMMED))
        for short in ("*bf16", "*fp32"):
            variant = given | {"gradient": short} | kernels._WRITTEN
            print("gradient", *usage(kernels._gradient_block, absent=[*absent, "bias"], **variant))
            print("sigmoid", *usage(kernels._sigmoid_block, absent=absent, **variant))
        variant = given | kernels._WRITTEN
        print("sigmoid", *usage(kernels._sigmoid_block, absent=[*absent, "gradient"], **variant))
    print("merge", *usage(kernels._merge_parts, capability=capability, num_parts=48, **kernels._MERGED))


if __name__ == "__main__":
    main(int(sys.argv[1]))
