"""Checks of what a command needs, made before anything expensive starts.

Each is a function that returns in a few words what it found, or raises the error with its cure. Commands call those
that they need; `python -m sfgrpo doctor` calls all.
"""
