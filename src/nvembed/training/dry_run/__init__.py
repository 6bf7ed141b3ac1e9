"""What a run would do, found without starting it."""
