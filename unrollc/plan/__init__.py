"""Plans: which states are kept (schedule), what lives when (memory), which mode is cheaper."""
