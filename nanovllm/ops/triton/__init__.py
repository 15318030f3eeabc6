"""Triton kernels: what the operations run on an NVIDIA GPU."""
