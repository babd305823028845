"""The CUDA backend: kernels in source form, compiled at first use (compile.py), with tile sizes from plan.py."""
