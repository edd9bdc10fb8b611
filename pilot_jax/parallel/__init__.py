"""Devices and processes: JAX's settings, the mesh and its table of rules, several processes, host memory.
"""
