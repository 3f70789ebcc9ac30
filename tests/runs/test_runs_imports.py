from __future__ import annotations

import subprocess
import sys


def test_the_package_does_not_load_torch() -> None:
    code = (
        "import sys, phalanx.runs; loaded = {name.partition('.')[0] for name in sys.modules}; "
        "assert not loaded & {'torch', 'safetensors', 'numpy'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
