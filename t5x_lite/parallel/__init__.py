"""Devices and processes: meshes, logical axis rules, hosts, hardware facts.

The lowest floor: nothing here knows a model, a task or an optimizer.
"""
