"""The models in Python that a repository holds."""
