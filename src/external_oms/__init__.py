"""The face of the package: re-exports."""
