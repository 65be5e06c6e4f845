"""Research code at a lower bar: used by nobody else in the package, and changed without notice."""
