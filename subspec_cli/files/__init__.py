"""Plain files: where they are kept, and how they are written, read and locked. Knows nothing of their content."""
