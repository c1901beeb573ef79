"""A package, not a bare folder: some libraries install a package `tests` of their own, which would come first."""
