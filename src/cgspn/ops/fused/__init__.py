"""Fused Triton ops for the layers around the scan in a sub-layer. Each reads and writes its tokens once.

Each op has a module with its launches, its gradients and its definition in plain PyTorch. The kernels are in kernels.py
and row_kernels.py. They do not check their arguments: `cgspn.layers.executor` calls them only where they can run.
"""
