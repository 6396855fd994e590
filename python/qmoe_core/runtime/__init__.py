"""Packed layers at run time: torch ops (`ops`), modules (`linear`, `experts`) and routing statistics (`routing`).

Importing a submodule imports torch; importing this package alone does not.
"""
