"""Plain Python: which tokens run when, and in which blocks. Imports no torch."""
