import gc

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests run side by side; more threads than cores make small ones ten times slower."""
    torch.set_num_threads(1)


def pytest_collection_finish(session):
    """What imports have made stays; collections that look at all of it would take a third of a second each."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Let go of it: extensions complain at the end of what they think has leaked."""
    gc.unfreeze()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
