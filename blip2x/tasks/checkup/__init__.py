"""What ``task=doctor`` looks at: one module per kind of check, each of which gives its findings."""
