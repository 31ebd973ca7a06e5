"""Supervision of llama.cpp's llama-server routers: their processes, their models, and what happens to them.

`llamavisor.fleet` is the public face. Nothing is imported here: the worker that reads a models folder needs a few
modules of this package and must start in a few milliseconds.
"""
