"""Without a CUDA GPU the kernels run in Triton's interpreter, which must be chosen before they are imported."""

import os
from contextlib import nullcontext

import pytest
import torch

if torch.cuda.is_available():
    # What eager PyTorch is compared with is fp32, and the same in every run.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
else:
    os.environ["TRITON_INTERPRET"] = "1"
    from tests import interpreter

    interpreter.quicken()
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and there is none")


@pytest.fixture(autouse=True)
def _seeded():
    """The random numbers of a test do not depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _settings_of_cudnn():
    """What is timed lets cuDNN search, and sets its precision by convolution, which exporters refuse to read."""
    allowed = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture
def on_device():
    """Whatever a test makes lies where the kernels run: on the GPU if there is one."""
    with torch.device("cuda") if torch.cuda.is_available() else nullcontext():
        yield


@pytest.fixture
def checked_for_overflow():
    """Integers of the interpreter that overflow raise; for tensors that are large enough for it."""
    with nullcontext() if torch.cuda.is_available() else interpreter.checked_for_overflow():
        yield


@pytest.fixture(scope="session", autouse=True)
def _nobodys_cache(tmp_path_factory):
    """What was measured on this machine, or is noted about it, decides nothing in the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_FUSED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What the library keeps on disk lies in the test's own folder."""
    from resnet_fused.plan import tuned

    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path))
    tuned.load.cache_clear()
    yield
    tuned.load.cache_clear()
