"""Timings, one file a benchmark, with programs nobody here wrote beside."""
