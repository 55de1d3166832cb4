"""Functions for the lessons: exact paths, densities, interactive pictures, exercises."""
