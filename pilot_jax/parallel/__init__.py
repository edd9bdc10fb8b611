"""Devices and processes: JAX's settings, the mesh and its one rule table, several processes, host memory.

Imports config and errors.
"""
