"""Decoupled Value Policy Optimization: the method. Imports neither `server` nor `reproduce`."""

__version__ = "0.1.0"
