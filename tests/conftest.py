"""One thread and no GPU, for child processes too: xdist already uses every core."""

import os
import signal
import site
import subprocess
import sys
import venv
from pathlib import Path

import filelock
import pytest

# Set before torch is imported. More threads would round sums differently, so it must be 1.
os.environ["OMP_NUM_THREADS"] = "1"

# A process that a script starts in the background ignores Ctrl-C, and so would its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

FRONT_END = ("notebook", "ipywidgets", "ipykernel", "ipython", "jupyter_client", "traitlets",
             "anywidget", "tornado", "pyzmq", "nbconvert", "numpy", "pandas")  # fmt: skip


@pytest.fixture(autouse=True)
def without_gpu(request, monkeypatch):
    """Hide GPUs from all tests but those that are for them."""
    if not request.node.get_closest_marker("cuda"):
        import torch  # not before OMP_NUM_THREADS is set

        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def colab_python(tmp_path_factory):
    """A Python with Colab's versions of the packages that show widgets, and ours for the rest.

    The environment variable TWIN names a folder to keep it in, or one that already holds it.
    """
    home = tmp_path_factory.getbasetemp()
    home = home.parent if "PYTEST_XDIST_WORKER" in os.environ else home
    folder = Path(os.environ.get("TWIN", home / "twin"))
    ours = (folder / "lib/python{}.{}/site-packages".format(*sys.version_info)) / "zz_ours.pth"
    listed = Path(__file__).with_name("study") / "colab-packages.txt"
    pins = [p for p in listed.read_text("utf-8").split() if p.partition("==")[0] in FRONT_END]
    with filelock.FileLock(f"{folder}.lock"):
        if not ours.exists():
            venv.create(folder, with_pip=True)
            pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", *pins, "setuptools<81"]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"pip cannot install Colab's versions: {done.stderr[-200:]}")
            project = str(Path(__file__).parents[1])
            ours.write_text("\n".join([*site.getsitepackages(), project]))
    return folder / "bin/python"
