"""Scores from predictions and references; nothing here knows a model."""
