"""Devices and processes: what JAX is told, the mesh and its one rule table, several processes.

Imports config and errors.
"""
