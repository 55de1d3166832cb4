"""Solvers in other people's pipelines and runtimes."""
