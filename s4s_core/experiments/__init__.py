"""Runs, their results, and the tables and pictures made of them."""
