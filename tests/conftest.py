import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests run side by side; more threads than cores make small ones ten times slower."""
    torch.set_num_threads(1)
