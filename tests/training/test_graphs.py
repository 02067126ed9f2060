"""A step replayed by a CUDA graph equals the step without one.

Without a GPU a stand-in records the operations of a step and repeats them on the same tensors. Like
a graph, it repeats no Python. ``-m cuda`` runs real graphs.
"""

import contextlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import toy

import hybrid_lib as hl
from hybrid_lib.training import loop, tasks
from hybrid_lib.training.experiments import PAPER_METHODS


class Recorder(TorchDispatchMode):
    """Records operations, which are undone in the end, since a capture computes nothing."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made, self.own, self.generators = [], {}, set(), [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(function):
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for tensor in filter(torch.is_tensor, tree_leaves((args, kwargs))):
            if id(tensor) not in self.made:  # some operations write without declaring it
                self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        answer = function(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t, _ in self.before.values()}
        new = [t for t in tree_leaves(answer) if torch.is_tensor(t)]
        self.own += [t for t in new if t.untyped_storage().data_ptr() not in given]
        if "aten.empty" not in str(function):  # writes nothing
            self.calls.append((function, args, kwargs, answer))
        self.made |= {*map(id, tree_leaves(answer))}
        return answer

    def register_generator_state(self, generator):
        self.generators.append((generator, generator.get_state()))

    def replay(self):
        with torch.no_grad():
            for tensor in self.own:  # another tensor may have used its memory since
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
            for function, args, kwargs, then in self.calls:
                now = function(*args, **kwargs)
                for old, new in zip(tree_leaves(then), tree_leaves(now)):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """Replace torch.cuda's graphs by recorders; returns the list of those made."""
    recording, made = [], []

    @contextlib.contextmanager
    def graph(recorder, **how):
        made.append(recorder)
        recording.append(recorder)
        try:
            with recorder:
                yield
        finally:
            recording.pop()
            with torch.no_grad():
                for tensor, value in recorder.before.values():
                    tensor.copy_(value)
            for generator, state in recorder.generators:
                generator.set_state(state)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda of: contextlib.nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(recording))
    return made


METHODS = [*PAPER_METHODS, "padam", "adam+lion"]


def losses(name, device, capture=False, compile=False, **changes) -> list[float]:
    """Training and test losses of three epochs of five steps, the last with a smaller batch."""
    e = toy(name, **{"lr": 0.001, "train_limit": 100, "batch_size": 24, **changes})
    task = tasks.load_task(e, device)
    *_, rows = loop.epochs(e, task, capture=capture, compile=compile)
    return [row[name] for row in rows for name in ("train_loss", "test_loss")]


WAYS = [*((name, False) for name in ("dyn_atmo", "padam_sgd", "adahessian", "adam+lion")),
        ("atmo", True), ("adasgd", True)]  # fmt: skip


@pytest.mark.parametrize(("name", "foreach"), WAYS)
def test_a_captured_run_has_the_same_losses(name, foreach, graphs, monkeypatch):
    if foreach:
        make = hl.Experiment.build_optimizer

        def with_foreach(*arguments):
            optimizer = make(*arguments)
            optimizer.param_groups[0]["foreach"] = True
            return optimizer

        monkeypatch.setattr(hl.Experiment, "build_optimizer", with_foreach)
    expected = losses(name, "cpu")
    assert not graphs
    found = losses(name, "cpu", capture=True)
    assert len(graphs) >= 3  # whole batches, the smaller last one, the tests
    assert found == pytest.approx(expected, rel=1e-3)


CHANGES = [
    {"dataset": "python-docs", "width": 8}, {"hessian_every": 2, "hessian_fraction": 0.5},
    {"restart_epoch": 3}, {"validation_limit": 30, "augment": True},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES)
def test_captured_runs_of_other_kinds_have_the_same_losses(changes, graphs):
    expected = losses("adasgd", "cpu", **changes)
    found = losses("adasgd", "cpu", capture=True, **changes)
    assert graphs
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_run_that_cannot_be_captured_goes_on_and_says_why(graphs, capsys, monkeypatch):
    loss = tasks.ImageClassification.loss

    def reads_a_value(*arguments, **how):
        value = loss(*arguments, **how)
        assert value.item() > 0  # a graph cannot wait for a value
        return value

    monkeypatch.setattr(tasks.ImageClassification, "loss", reads_a_value)
    expected = losses("atmo", "cpu")
    assert losses("atmo", "cpu", capture=True) == expected
    printed = capsys.readouterr().out.splitlines()
    assert printed
    assert all(line.startswith("continuing without a CUDA graph: ") for line in printed)


def test_a_capture_needs_capturable_and_a_step_before_it(graphs):
    """Otherwise a graph would repeat one step's corrections, or read numbers never written."""
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = hl.adam([w])
    w.grad = torch.ones(2)
    for message in ("for ever", "take a step"):
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(Recorder()):
            optimizer.step()
        optimizer.capturable = True
    assert torch.equal(w.detach(), torch.ones(2))


def test_a_replayed_optimizer_counts_its_steps(graphs):
    """Rates and weights may change between replays; a state saved between them is up to date."""
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    replayed, plain = hl.atmo([ours]), hl.atmo([theirs])
    replayed.capturable = True
    ours.grad, theirs.grad = torch.zeros(2), torch.zeros(2)
    graph = Recorder()
    for step in range(6):
        for optimizer, w in ((replayed, ours), (plain, theirs)):
            w.grad.copy_(torch.tensor([1.0, step]))
            numbers = {"lr": 0.1 / (step + 1), "lambdas": (0.5, 0.1 * (step + 1))}
            optimizer.param_groups[0].update(numbers, decoupled_weight_decay=0.05 * (step + 1))
        plain.step()
        if step < 2:
            replayed.step()
            continue
        if step == 2:
            with torch.cuda.graph(graph):
                replayed.step()
        replayed.advance()
        graph.replay()
    torch.testing.assert_close(ours, theirs)
    assert replayed.state[ours]["step"] == 6
    replayed.param_groups[0]["lr"] = -1
    with pytest.raises(ValueError, match="lr=-1"):
        replayed.advance()
    assert replayed.state[ours]["step"] == 6
    replayed.load_state_dict(plain.state_dict())  # its buffers are not the graph's
    with pytest.raises(RuntimeError, match="no step was captured"):
        replayed.advance()


def test_a_replay_gives_every_group_its_own_numbers(graphs):
    def made():
        params = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
        rules = hl.rules.Adam(), hl.rules.SGD(momentum=0.9)
        others = {"params": params[1:], "rules": rules[1:], "lambdas": (1.0,)}
        return params, hl.Hybrid([{"params": params[:1]}, others], rules, 0.1, (0.5, 0.5))

    (ours, replayed), (theirs, plain), graph = made(), made(), Recorder()
    replayed.capturable = True
    for w in ours + theirs:
        w.grad = torch.zeros(2)
    for step in range(5):
        for w in ours + theirs:
            w.grad.copy_(torch.tensor([1.0, step]))
        for optimizer, i in itertools.product((replayed, plain), range(2)):
            optimizer.param_groups[i]["lr"] = 0.1 * (1 + 2 * i) / (step + 1)
        plain.step()
        if step < 2:
            replayed.step()
            continue
        if step == 2:
            with torch.cuda.graph(graph):
                replayed.step()
        replayed.advance()
        graph.replay()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("merge", ["product", "sum", "graft"])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_rule_without_weight_is_left_out_of_a_replay(merge, foreach, graphs):
    """Even if its direction is not finite, like Adam's for a zero gradient with eps = 0."""
    w = torch.nn.Parameter(torch.ones(2))
    rules = hl.rules.SGD(), hl.rules.Adam(eps=0.0)
    optimizer = hl.Hybrid([w], rules, lr=0.1, lambdas=(1.0, 0.0), merge=merge, foreach=foreach)
    optimizer.capturable, w.grad, graph = True, torch.zeros(2), Recorder()
    optimizer.step()
    with torch.cuda.graph(graph):
        optimizer.step()
    optimizer.advance()
    graph.replay()
    assert w.isfinite().all()
