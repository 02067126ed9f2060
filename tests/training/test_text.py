"""The text task: windows of characters, a transformer, and runs that resume and refuse."""

from dataclasses import replace
from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F

import hybrid_lib as hl
from hybrid_lib.training import engines
from hybrid_lib.training.experiments import get_experiment
from hybrid_lib.training.tasks import load_task
from hybrid_lib.training.text import WINDOW, Block, CharacterModel

LAYOUT = torch.contiguous_format
TEXT = "\n".join(topics[name] for name in sorted(topics))


def experiment(name="adam", **changes):
    sizes = {"width": 8, "batch_size": 8, "train_limit": 40, "test_limit": 9}
    return replace(get_experiment(name).scaled(2), dataset="python-docs", **{**sizes, **changes})


def words(task, windows):
    return ["".join(task.symbols[i] for i in window) for window in windows.tolist()]


@pytest.mark.parametrize("limits", [{}, {"train_limit": None, "test_limit": None}])
def test_windows_cover_two_parts_of_the_text_and_targets_are_the_next_characters(limits):
    task = load_task(experiment(**limits))
    cut = len(TEXT) * 9 // 10
    for batches, start, n in (
        (task.training_batches(0, LAYOUT), 0, 40 if limits == {} else cut // WINDOW - 1),
        (task.test_batches(LAYOUT), cut, 9 if limits == {} else (len(TEXT) - cut) // WINDOW - 1),
    ):
        pairs = [pair for x, y in batches for pair in zip(words(task, x), words(task, y))]
        expected = [TEXT[start + i * WINDOW :][: WINDOW + 1] for i in range(n)]
        assert sorted(pairs) == sorted((text[:-1], text[1:]) for text in expected)
    assert task.n_train == (40 if limits == {} else cut // WINDOW - 1)


def test_the_validation_set_is_the_end_of_the_training_text():
    task = load_task(experiment(validation_limit=10))
    trained = [w for x, _ in task.training_batches(3, LAYOUT) for w in words(task, x)]
    validated = [w for x, _ in task.validation_batches(LAYOUT) for w in words(task, x)]
    assert (len(trained), len(validated)) == (29, 10)  # the window between them is in neither
    places = [TEXT.index(w) for w in (*trained, *validated)]
    assert max(places[:29]) + WINDOW < min(places[29:])
    assert max(places) + WINDOW <= 41 * WINDOW


def test_augmentation_shifts_all_windows_anew_in_every_epoch():
    task = load_task(experiment(augment=True))
    starts = [{TEXT.index(w) % WINDOW for x, _ in task.training_batches(epoch, LAYOUT)
               for w in words(task, x)} for epoch in range(3)]  # fmt: skip
    assert [len(s) for s in starts] == [1, 1, 1]
    assert len(set.union(*starts)) > 1
    orders = [next(iter(load_task(experiment(seed=s)).training_batches(0, LAYOUT)))[0]
              for s in (0, 0, 1)]  # fmt: skip
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_attention_matches_torch_s_own_and_sees_no_future():
    torch.manual_seed(0)
    block, x = Block(16).double(), torch.randn(3, 7, 16, dtype=torch.float64)
    q, k, v = block.queries_keys_values(block.norm1(x)).chunk(3, dim=-1)
    q, k, v = (part.view(3, 7, 4, 4).transpose(1, 2) for part in (q, k, v))
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    expected = x + block.mixed(seen)
    expected = expected + block.perceptron(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)

    model, text = CharacterModel(11, 8), torch.randint(11, (2, WINDOW))
    changed = text.clone()
    changed[:, 40] = (text[:, 40] + 1) % 11
    before, after = model(text), model(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert (before[:, 40:] != after[:, 40:]).any(dim=-1).all()


def test_the_model_has_as_many_parameters_as_its_docstring_says():
    assert sum(p.numel() for p in CharacterModel(103, 64).parameters()) == 117_479


@pytest.mark.parametrize("name", ["sgd", "dyn_padam_sgd", "adasgd"])
def test_a_stopped_run_resumes_to_the_same_numbers(tmp_path, name):
    e = experiment(name, lr=0.01, validation_limit=10)
    straight = hl.run(e, progress=False)
    assert straight.status == "complete"
    steps = iter(range(99))
    stopped = hl.run(e, tmp_path, progress=False, should_stop=lambda: next(steps) == 5)
    assert (stopped.status, len(stopped.rows)) == ("stopped", 1)
    resumed = hl.run(e, tmp_path, progress=False)
    kept = [[{k: v for k, v in row.items() if "seconds" not in k} for row in h.rows]
            for h in (straight, resumed)]  # fmt: skip
    assert kept[0] == kept[1]
    assert kept[0][-1].keys() >= {"validation_loss", "validation_accuracy"}


def test_a_run_learns_more_than_character_frequencies_and_names_its_text():
    history = hl.run(experiment(lr=0.01, train_limit=400, epochs=3), progress=False)
    assert history.final["test_loss"] < 3.1, "frequencies of characters alone cost 3.25"
    assert all(0 < row["train_accuracy"] < 1 for row in history.rows)
    assert history.dataset.startswith("Python 3.")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "adasgd"])
def test_the_compiled_engine_agrees_on_text(name):
    e = experiment(name, width=16)
    task = load_task(e)
    x, y = next(iter(task.training_batches(0, LAYOUT)))
    found = []
    for engine in (engines.eager_pass, engines.compiled_pass):
        probes = torch.Generator().manual_seed(1) if e.needs_hessian else None
        found.append(engine(task.build_model(), task)(x, y, probes))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"protocol": "released"}, "protocol='released'"), ({"stem": "imagenet"}, "stem='imagenet'"),
     ({"precision": "float16"}, "float16"), ({"width": 6}, "width=6.*multiple of the 4 heads"),
     ({"train_limit": 10**6}, r"train_limit=1000000: there are \d+ windows"),
     ({"validation_limit": 33}, "batch_size=8"),
     ({"validation_limit": 10**6, "train_limit": None}, "0 windows left by validation_limit=1")],
)  # fmt: skip
def test_settings_that_text_does_not_have_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        load_task(experiment(**changes))
