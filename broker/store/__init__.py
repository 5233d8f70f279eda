"""Redis: one module a concept, with the names of its keys beside its code."""
