"""Weight formats: how the tensors of a Linear look in a checkpoint and in memory, and how they
multiply."""
