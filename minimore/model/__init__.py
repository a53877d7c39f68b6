"""From the bytes of a checkpoint to hidden states."""
