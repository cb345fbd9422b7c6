"""What task=benchmark is made of: the work that is measured, the clock, and what becomes of its figures."""
