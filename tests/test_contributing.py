"""The first recipe of CONTRIBUTING.md, followed to the letter, adds a rule and its hybrid."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

USE = """
from dataclasses import replace
import torch
import hybrid_lib as hl
from hybrid_lib.optim.methods import get_method, label, look
from hybrid_lib.study import planning

w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
optimizer = hl.signum_sgd([w], lr=0.5, lambdas=(1.0, 0.0))
w.grad = torch.tensor([3.0, -4.0])
optimizer.step()
assert w.tolist() == [0.5, -1.5], w
assert "beta" in get_method("signum").settings
assert get_method("signum+adam").label == "Signum + Adam"
assert label("signum_sgd") == "Signum + SGD" and look("signum_sgd")[1] == "longdash"
(short,) = planning.plan("toy", only=["signum_sgd"])
for how in ({}, {"merge": "graft"}):
    print(hl.run(replace(short, **how), progress=False).status)
"""


def test_the_first_recipe_adds_a_rule_and_its_hybrid(tmp_path):
    recipe = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("\n## ")[1]
    rule, entries = re.findall(r"^```python\n(.*?)^```$", recipe, re.M | re.S)
    library = shutil.copytree(ROOT / "hybrid_lib", tmp_path / "hybrid_lib")
    shutil.copytree(ROOT / "data" / "paper", library / "paper")
    with open(library / "optim" / "rules.py", "a", encoding="utf-8") as file:
        file.write(f"\n\n{rule}")
    methods = library / "optim" / "methods.py"
    table, end, rest = methods.read_text("utf-8").partition("\n}  # fmt: skip")
    assert end
    methods.write_text(f"{table}\n{entries}{end}{rest}", "utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", USE], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["complete", "complete"]
