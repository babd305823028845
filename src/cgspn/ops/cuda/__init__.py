"""The CUDA backend: kernels shipped as source, compiled at first use (compile.py), cut for the shape (plan.py)."""
