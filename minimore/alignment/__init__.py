"""From a reward to a policy."""
