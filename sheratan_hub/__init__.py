"""Sheratan Hub: hands work out to a fleet of machines over plain HTTP."""

__version__ = "0.1.0"
