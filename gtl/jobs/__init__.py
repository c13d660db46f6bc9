"""Commands as jobs of a remote Ray cluster: sent, followed, taken up again after a failure that was none of theirs."""
