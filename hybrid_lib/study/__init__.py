"""Studies of many runs: planning, training, statistics, figures. Needs the extra ``study``."""

from importlib.util import find_spec

_missing = [name for name in ("pandas", "scipy", "plotly", "yaml", "papermill", "nbconvert",
                              "ipywidgets") if find_spec(name) is None]  # fmt: skip
if _missing:
    raise ImportError(
        f"studies, notebooks and widgets need {', '.join(_missing)}: install the extra `study`, "
        "as in pip install -e '.[study]'"
    )
