"""Which recipe is best: studies of many training runs on Ray Tune."""
