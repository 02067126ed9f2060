"""Whatever papermill injects into a notebook is checked before anything is computed.

A namespace here is IPython's after papermill's cell.
"""

from dataclasses import replace

import pytest

from hybrid_lib.study import planning
from hybrid_lib.study.parameters import checked
from hybrid_lib.study.planning import plan

DECLARED = """
scale: str = "demo"  # toy, demo or paper
dataset: str = "digits"  # a name
methods: str = ""  # names
seeds: str = "0"  # text
epochs: int = None  # or a number
lr: float = 0.1  # a rate
train: bool = True  # or not
"""
DEFAULTS = dict(
    scale="demo", dataset="digits", methods="", seeds="0", epochs=None, lr=0.1, train=True
)


def namespace(*cells: str, declared: str = DECLARED, **given) -> dict:
    """The globals of a notebook after its declared parameters, the injected ones and ``cells``."""
    injected = "# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in given.items())
    known: dict = {"In": ["", declared, *([injected] if given else []), *cells]}
    exec(declared + injected, known)
    return known


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("train", "false", False), ("train", "False", False), ("train", 0, False),
        ("train", "true", True), ("lr", "1e-3", 0.001), ("lr", 1, 1.0), ("lr", "0.5", 0.5),
        ("epochs", "7", 7), ("epochs", 7, 7), ("epochs", 7.0, 7), ("epochs", None, None),
        ("seeds", 3, "3"), ("seeds", "0-2", "0-2"), ("dataset", "digits", "digits"),
    ],
)  # fmt: skip
def test_injected_values_are_converted_to_the_declared_types(name, given, value):
    values = vars(checked(namespace(**{name: given}), lambda params: None))
    assert values == {**DEFAULTS, name: value, "plan": None}
    assert type(values[name]) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, r"epoch is not a parameter of this notebook \(did you mean epochs\?\)"),
        ({"epochs": 2.5}, r"epochs=2\.5: .*integer"),
        ({"lr": "fast"}, r"lr='fast': .*number"),
        ({"lr": None}, r"lr=None: .*number"),
        ({"train": "maybe"}, r"train='maybe': .*boolean"),
        ({"seeds": [1, 2]}, r"seeds=\[1, 2\]: .*string"),
        ({"scale": "huge"}, r"scale='huge'.*toy, demo, colab, paper"),
    ],
)
def test_a_faulty_parameter_is_named_with_its_value(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        checked(namespace(**given), planning.experiments_from)
    assert "\n" not in str(caught.value)
    assert "(parameters: scale, dataset, methods, seeds, epochs, lr, train)" in str(caught.value)


def test_all_faults_come_in_one_line():
    with pytest.raises(ValueError, match="epoch is not") as caught:
        checked(
            namespace(epoch=3, trian=False, lr="fast", train="maybe"), planning.experiments_from
        )
    message = str(caught.value)
    for part in ("did you mean epochs", "did you mean train", "lr='fast'", "train='maybe'"):
        assert part in message


@pytest.mark.parametrize(
    "cell",
    [
        "%matplotlib inline\n!ls", "note = 3", "x = y = 1\nprint(x)", "import os", "", "for i in",
        "paths: list[str] = []", "count: int", "note: 'text' = 1", "params.lr: float = 3",
        "numbers: dict = {}\ndef f(): pass", "n: int = 1\nfor n in []: pass", "n: int = 1\nn += 1",
    ],
)  # fmt: skip
def test_the_reader_s_own_cells_do_not_count_as_parameters(cell):
    assert vars(checked(namespace(cell), lambda params: None)) == {**DEFAULTS, "plan": None}


@pytest.mark.parametrize("changed", ["seeds = '0-2'", "seeds: str = '0-2'\nprint(seeds)"])
def test_parameters_without_types_are_not_ignored(changed):
    known = {"In": ["", changed]}
    exec(changed, known)
    with pytest.raises(ValueError, match="no cell declares parameters with types"):
        checked(known, lambda params: None)


def test_parameters_may_be_changed_by_hand_and_run_again():
    known = namespace()
    changed = DECLARED.replace("epochs: int = None", "epochs: int = 4")
    exec(changed, known)
    known["In"] += ["params = parameters.checked(globals(), check)", changed]
    assert checked(known, planning.experiments_from).epochs == 4


ONE = """
optimizer: str = "atmo"  # a method
dataset: str = "digits"  # a name
scale: str = "toy"  # toy
epochs: int = None  # a number
lr: float = None  # a rate
batch_size: int = None  # a number
lambda_schedule: str = None  # a shape
lambda_start: str = None  # two weights
protocol: str = "clean"  # or released
seed: int = 0  # a seed
"""


@pytest.mark.parametrize(
    ("given", "message"),
    [({"optimizer": "adamm"}, r"'adamm'.*did you mean adam"),
     ({"lambda_start": "1,0,0"}, r"lambda_start=.*one weight each for Adam, SGD"),
     ({"lr": "nan"}, r"lr=nan"),
     ({"batch_size": 161}, r"batch_size=161.*train_limit=160"),
     ({"learning_rate": 0.1}, r"learning_rate is not a parameter")],
)  # fmt: skip
def test_one_experiment_s_parameters_are_refused_before_anything_is_trained(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        checked(namespace(declared=ONE, **given), planning.experiment_from)
    assert "\n" not in str(caught.value)


def test_one_experiment_is_its_row_with_the_given_changes():
    known = namespace(declared=ONE, lr="0.5", lambda_start="0.9 0.1", optimizer="adasgd", seed=4)
    e = checked(known, planning.experiment_from).plan
    (row,) = plan("toy", only=["adasgd"], seeds=[4])
    assert e == replace(row, lr=0.5, lambda_start=(0.9, 0.1))
