"""gin as a thin front: files and bindings in, a checked call out. Only this folder knows gin."""
