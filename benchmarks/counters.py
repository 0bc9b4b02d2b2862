"""Launch the kernels that are worth counting, each once, under a profiler.

    ncu --csv --page raw --clock-control none --kernel-name regex:row_norm_kernel \
        --metrics smsp__inst_executed.sum,smsp__warps_launched.sum python benchmarks/counters.py

A row of the CSV belongs to each case, in order; tests/gpu/steps.py has the whole command.  Executed
instructions over the packs that are printed are what predictions.py has from the machine code.
"""

from __future__ import annotations

import graphs
import predictions
import torch
from cases import HEADLINES, candidates, make_sets

from normkit._bench import NORMKIT

NAMES = ("head_norm 128", "rms_norm 4096", "rms_norm 8192", "rms_norm 5120")
COUNTED = (*NAMES, "rms_norm 8192 float32 weight")


@torch.no_grad()
def main() -> None:
    by_name = {predictions.name_of(case): case for case in HEADLINES}
    for name in COUNTED:
        case = by_name[name]._replace(rivals=False)
        (names,) = make_sets(case, 1, graphs.DEVICE)
        candidates(case, graphs.DEVICE, {})[NORMKIT](names)
        torch.cuda.synchronize()
        packs = names["x"].nbytes // predictions.WARP_BYTES
        expected = predictions.INSTRUCTIONS[name]
        print(f"{name}: {packs} packs of warps, {expected} instructions each expected")


if __name__ == "__main__":
    main()
