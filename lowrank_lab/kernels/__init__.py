"""Kernels for float32 training on CPUs, compiled once per machine where it has a C++ compiler."""
