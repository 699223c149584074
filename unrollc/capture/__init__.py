"""Capture: the user's model, loss and optimizer become `StepGraph`s."""
