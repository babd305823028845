"""What stands around the scan in a sub-layer, each reading and writing its tokens once, in Triton.

A module each has the launches, the gradients and the definition in plain PyTorch; kernels.py and row_kernels.py have
the kernels. They check nothing: `cgspn.layers.executor` decides where they run.
"""
