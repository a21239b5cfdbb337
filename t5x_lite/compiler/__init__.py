"""Steps as programs for a mesh, and what a compiled program costs.

FLOPs, memory and network by formula, and what the compiler's output says. Nothing is allocated.
"""
