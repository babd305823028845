"""Build the wheel, install it in a clean environment, and use it there as a new user would."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

OPERATOR = """
import torch, cgspn
from cgspn.ops import propagate_2d, propagate_2d_reference
x, lam, u = torch.randn(1, 5, 7, 3), torch.randn(1, 5, 7, 4, 3), torch.randn(1, 5, 7, 4, 3)
logits = torch.randn(1, 5, 7, 4, 3, 3)
y, reference = propagate_2d(x, logits, lam, u), propagate_2d_reference(x, logits, lam, u)
error = ((y - reference).norm() / reference.norm()).item()
assert error < 1e-5, error
tokens = cgspn.create_model("cgspn_mini_patch4_28")(torch.randn(1, 3, 28, 56)).tokens
assert tokens.shape == (1, 7, 14, 96)
print(f"cgspn {cgspn.__version__}: relative error of the operator {error:.1e}")
"""


def main() -> None:
    """Exit with the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="torch", help="requirement that pip installs first (default: torch)")
    torch = parser.parse_args().torch
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", work, root], check=True)
        (wheel,) = work.glob("*.whl")
        if not wheel.name.endswith("-py3-none-any.whl"):
            sys.exit(f"{wheel.name} is not a pure-Python wheel")
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        venv.create(work / "env", with_pip=True)
        python, program = work / "env/bin/python", work / "env/bin/cgspn"
        subprocess.run([python, "-m", "pip", "install", "--quiet", torch], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
        # away from the sources, so that the installed package is what runs
        subprocess.run([python, "-c", OPERATOR], check=True, cwd=work)
        subprocess.run([program, "--help"], check=True, cwd=work, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
