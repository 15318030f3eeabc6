"""Plain Python: which tokens run when, and in which pages. Imports no torch."""
