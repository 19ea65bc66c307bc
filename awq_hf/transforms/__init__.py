"""Transforms: what is done to a weight or its grid before integers are chosen. One file per idea."""
