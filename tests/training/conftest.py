"""These tests need PyTorch: `make test-train`."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torch") else ["test_*.py"]

if find_spec("torch"):
    import torch

    # Small networks are computed faster by one thread, and others run beside.
    torch.set_num_threads(1)
