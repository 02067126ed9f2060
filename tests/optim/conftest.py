import pytest
import torch


@pytest.fixture
def traced(monkeypatch):
    """Run compiled functions as torch traces them: generating their code takes seconds each."""
    compile = torch.compile

    def trace(function, *, options, **how):
        kept = {k: v for k, v in options.items() if k == "guard_filter_fn"}
        return compile(function, backend="aot_eager", options=kept, **how)

    monkeypatch.setattr(torch, "compile", trace)
