"""A run directory made readable: one self-contained HTML page (`page`) or a terminal (`inspect`).

Both read tables and manifests only, so they work on a finished run, on one that stopped half-way
and on an object store. A new section is one function, see `section.py`.
"""
