"""Synthetic data: rows in, rows that models wrote and programs verified out, each with its provenance."""
