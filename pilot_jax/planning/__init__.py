"""What a run will need, computed from shapes alone: memory, FLOPs, bytes, lowered programs, the ownership table."""
