from __future__ import annotations

import subprocess
import sys

FORBIDDEN = ("torch", "matplotlib.pyplot", "phalanx.training", "phalanx.evaluation", "phalanx.data", "phalanx.models")


def test_a_report_needs_no_torch_and_no_global_plotting_state() -> None:
    code = f"import sys, phalanx.report; print([name for name in {FORBIDDEN} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
