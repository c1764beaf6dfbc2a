"""Sparse training inside other people's trainers: a callback each."""
