"""A model behind HTTP: the thread that owns the device, and the ASGI application.

Nothing here opens a socket or a checkpoint; `programs/serve.py` does. The web framework is in the
`serve` extra and is imported by `app.py` alone.
"""
