"""The Triton backend of dynamic routing."""
