"""The other ways to make a model small, to compare with."""
